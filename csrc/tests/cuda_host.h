// The CUDA kernels compiled for the host, behind what stands for the driver's launch.
#pragma once

#include <cstddef>
#include <cstdint>

// Returns 0, or 1 where no kernel has this symbol. grid, block: x, y, z; z is 1.
extern "C" int tubelet_cuda_host_launch(const char* symbol, const uint32_t* grid, const uint32_t* block,
                                        const void* arguments);

// The bytes of a kernel's arguments; 0 where no kernel has this symbol.
extern "C" size_t tubelet_cuda_host_arguments(const char* symbol);
