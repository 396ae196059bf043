// Launchers for CUDA: what a checked operation found in, which kernel to run and how out.
//
// Nothing runs here and no CUDA library is needed: the caller hands the launch to the driver (runtime/cuda.py) or, in
// tests, to the same kernels compiled for the host. Kernels allocate nothing and wait for nothing.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "../kernels.h"

namespace tubelet::cuda {

struct Launch {
    std::string symbol;
    std::array<uint32_t, 3> grid, block;
    std::string arguments;  // the bytes of the kernel's only parameter
};

Launch launch_rope3d(const RopeTable& table);
Launch launch_pack(const Packing& packing);
Launch launch_unpack(const Packing& packing);
Launch launch_guided_step(const GuidedStep& step);

}  // namespace tubelet::cuda
