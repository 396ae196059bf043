// Checked operations: arrays in, what a launcher takes out. Each looks at rank, dtype, shape, layout and alignment, and
// names the argument that is wrong with its value. Memory is not touched, so it may be a device's. Still no Python.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace tubelet {

struct ArgumentError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// A borrowed n-dimensional array; strides count elements.
struct Array {
    static constexpr int kMaxRank = 4;

    const char* name;
    void* data;
    DType dtype;
    int rank;
    int64_t shape[kMaxRank];
    int64_t stride[kMaxRank];
};

using Triple = std::array<int64_t, 3>;
using RealTriple = std::array<double, 3>;

RopeTable rope3d(const Array& cos, const Array& sin, const Triple& grid, int64_t head_dim, double theta,
                 const RealTriple& offset, const RealTriple& ntk);

Packing pack(const Array& tokens, const Array& latent, const Triple& patch);

Packing unpack(const Array& latent, const Array& tokens, const Triple& patch);

// `matrix` alone is read here, so it is in host memory.
GuidedStep guided_step(const std::vector<Array>& state, const Array& velocity, const Array& tokens, const Array& matrix,
                       double guidance, const std::optional<Array>& known, const std::optional<Array>& clean,
                       const std::optional<Array>& noise, double clean_scale, double noise_scale);

}  // namespace tubelet
