// As much of CUDA C++ as kernels.cu needs to compile as host C++, where a launch is four loops.
#pragma once

#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim3 {
    uint32_t x, y, z;
};

inline thread_local Dim3 gridDim, blockDim, blockIdx, threadIdx;

// The kernels use no shared memory and wait for no other thread, so these may run one after another.
template <class Arguments>
void run_grid(void (*kernel)(Arguments), Dim3 grid, Dim3 block, const void* bytes) {
    Arguments arguments;
    std::memcpy(&arguments, bytes, sizeof arguments);
    gridDim = grid;
    blockDim = block;
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
            for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
                for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(arguments);
}
