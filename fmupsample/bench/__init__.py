"""Measuring upsamplers on the machine at hand: time, memory, cost by formula, probe quality."""
