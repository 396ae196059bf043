#include "cuda_host.h"

#include <cstring>

#include "cuda_shim.h"
//
#include "../cuda/kernels.cu"

extern "C" int tubelet_cuda_host_launch(const char* symbol, const uint32_t* grid, const uint32_t* block,
                                        const void* arguments) {
    const Dim3 blocks = {grid[0], grid[1], grid[2]}, threads = {block[0], block[1], block[2]};
#define KERNEL(name, ...) \
    if (!std::strcmp(symbol, #name)) return run_grid(name, blocks, threads, arguments), 0;
    TUBELET_CUDA_KERNELS(KERNEL)
#undef KERNEL
    return 1;
}

extern "C" size_t tubelet_cuda_host_arguments(const char* symbol) {
#define KERNEL(name, Arguments, ...) \
    if (!std::strcmp(symbol, #name)) return sizeof(Arguments);
    TUBELET_CUDA_KERNELS(KERNEL)
#undef KERNEL
    return 0;
}
