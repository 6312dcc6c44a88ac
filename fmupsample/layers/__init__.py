"""Small layers the upsamplers share: normalisation as numbers, linear filters. torch only."""
