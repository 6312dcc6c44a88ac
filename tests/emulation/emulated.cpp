// All CUDA sources as one library for the CPU: operators fmupsample_emulated::*.
#include "cuda_on_cpu.h"

#include "reassemble.cu"
#include "grad.cu"
#include "scores.cu"
#include "bindings.cpp"

extern "C" void fmupsample_emulation_order(int order) { emulation::order = order; }
extern "C" void fmupsample_emulation_capability(int capability) {
  fmupsample::emulated_capability = capability;
}
