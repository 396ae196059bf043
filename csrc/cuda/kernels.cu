// The CUDA kernels: one entry a symbol, which takes its arguments as one struct.
#include "guided_step.cuh"
#include "pack.cuh"
#include "rope3d.cuh"
#include "symbols.h"

using namespace tubelet;
using Chunk128 = Vector<uint32_t, 4>;

// One block in a place is enough: without the 1, the compiler spills registers to fit more.
#define KERNEL(symbol, Arguments, ...)                                                                         \
    extern "C" __global__ void __launch_bounds__(256, 1) symbol(const __grid_constant__ Arguments arguments) { \
        __VA_ARGS__(arguments);                                                                                \
    }
TUBELET_CUDA_KERNELS(KERNEL)
#undef KERNEL
