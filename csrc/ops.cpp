#include "ops.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace tubelet {
namespace {

constexpr int64_t kAny = -1;
constexpr int64_t kLargestAxis = int64_t(1) << 20;  // keeps every product of three axes far from overflow

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::f32:
            return "float32";
        case DType::f16:
            return "float16";
        case DType::bf16:
            return "bfloat16";
        default:
            return "another dtype";
    }
}

template <class Sizes>
std::string text(const Sizes& sizes, size_t rank) {
    std::string result = "[";
    for (size_t i = 0; i < rank; ++i)
        result += (i ? ", " : "") + (sizes[i] == kAny ? std::string("any") : std::to_string(sizes[i]));
    return result + "]";
}

[[noreturn]] void fail(const std::string& name, const std::string& problem) {
    throw ArgumentError(name + " " + problem);
}

void check_dtype(const Array& array, DType dtype) {
    if (array.dtype != dtype)
        fail(array.name, std::string("must be ") + name_of(dtype) + ", is " + name_of(array.dtype));
}

void check_float(const Array& array) {
    if (array.dtype == DType::other) fail(array.name, "must be float32, float16 or bfloat16");
}

// Rank, extents, alignment, and elements that follow each other in the last `dense` axes.
void check_layout(const Array& array, const std::vector<int64_t>& shape, int dense) {
    bool fits = array.rank == int(shape.size());
    for (int i = 0; fits && i < array.rank; ++i) fits = shape[i] == kAny || shape[i] == array.shape[i];
    if (!fits)
        fail(array.name, "must have shape " + text(shape, shape.size()) + ", has " + text(array.shape, array.rank));
    if (std::find(array.shape, array.shape + array.rank, 0) != array.shape + array.rank)
        return;  // strides mean nothing
    int64_t expected = 1;
    for (int i = array.rank - 1; i >= 0; --i) {
        const bool last = i >= array.rank - dense;
        if (array.shape[i] > 1 && (last ? array.stride[i] != expected : array.stride[i] < expected))
            fail(array.name, (last ? "must be contiguous in its last " + std::to_string(dense) + " axes"
                                   : "must not overlap itself or run backwards") +
                                 ", has strides " + text(array.stride, array.rank));
        expected = array.shape[i] > 1 ? array.stride[i] * array.shape[i] : expected;
    }
    if (reinterpret_cast<uintptr_t>(array.data) % element_size(array.dtype))
        fail(array.name, "must be aligned to its dtype");
}

void check(const Array& array, DType dtype, const std::vector<int64_t>& shape) {
    check_dtype(array, dtype);
    check_layout(array, shape, int(shape.size()));
}

// The stride of an axis of length 1 is whatever its maker left there.
int64_t stride_of(const Array& array, int axis, int64_t otherwise) {
    return array.shape[axis] > 1 ? array.stride[axis] : otherwise;
}

Patching patching_of(const Array& latent, const Triple& patch) {
    static const char* const axes[] = {"frames", "rows", "columns"};
    check_float(latent);
    check_layout(latent, {kAny, kAny, kAny, kAny}, 4);
    for (int i = 0; i < 3; ++i) {
        if (patch[i] < 1 || patch[i] > kLargestAxis) fail("patch", "must be positive, is " + text(patch, 3));
        if (latent.shape[i + 1] % patch[i])
            fail(latent.name, std::string("must have a number of ") + axes[i] + " that is a multiple of " +
                                  std::to_string(patch[i]) + ", has " + std::to_string(latent.shape[i + 1]));
    }
    return {latent.shape[0],
            latent.shape[1] / patch[0],
            latent.shape[2] / patch[1],
            latent.shape[3] / patch[2],
            patch[0],
            patch[1],
            patch[2]};
}

// The rows of `tokens` may be longer than a token's values, or lie apart.
Packing check_packing(const Array& tokens, const Array& latent, const Triple& patch) {
    const Patching p = patching_of(latent, patch);
    check_dtype(tokens, latent.dtype);
    check_layout(tokens, {p.t * p.h * p.w, kAny}, 1);
    if (tokens.shape[1] < p.values())
        fail(tokens.name, "must have at least " + std::to_string(p.values()) + " values a token, has " +
                              std::to_string(tokens.shape[1]));
    return {static_cast<char*>(tokens.data), static_cast<char*>(latent.data), stride_of(tokens, 0, tokens.shape[1]),
            element_size(latent.dtype), p};
}

// Each axis of d > 0 values: theta * ntk^(d/(d-2)), as diffusers' CosmosRotaryPosEmbed.
RopeAxis rope_axis(int64_t size, int64_t values, double theta, double offset, double ntk) {
    if (ntk != 1.0 && values <= 2) fail("ntk", "needs more than 2 values of the head on the axis that it stretches");
    const double stretched = ntk == 1.0 ? theta : theta * std::pow(ntk, double(values) / double(values - 2));
    return {size, values / 2, stretched, offset};
}

// Whether two arrays touch the same memory, taking each as the range from its first to its last byte.
bool overlap(const Array& one, const Array& other) {
    uintptr_t low[2], high[2];
    for (int k = 0; k < 2; ++k) {
        const Array& array = k ? other : one;
        int64_t last = 0;
        for (int i = 0; i < array.rank; ++i) {
            if (array.shape[i] == 0) return false;
            last += array.shape[i] > 1 ? (array.shape[i] - 1) * array.stride[i] : 0;
        }
        low[k] = reinterpret_cast<uintptr_t>(array.data);
        high[k] = low[k] + uintptr_t((last + 1) * element_size(array.dtype));
    }
    return low[0] < high[1] && low[1] < high[0];
}

void check_apart(const Array& written, const Array& other) {
    if (overlap(written, other)) fail(written.name, std::string("must not overlap ") + other.name);
}

}  // namespace

RopeTable rope3d(const Array& cos, const Array& sin, const Triple& grid, int64_t head_dim, double theta,
                 const RealTriple& offset, const RealTriple& ntk) {
    if (head_dim < 2 || head_dim % 2 || head_dim > kLargestAxis)
        fail("head_dim", "must be even and positive, is " + std::to_string(head_dim));
    for (int64_t size : grid)
        if (size < 1 || size > kLargestAxis) fail("grid", "must lie within 1 and 2^20, is " + text(grid, 3));
    if (!(theta > 0)) fail("theta", "must be positive, is " + std::to_string(theta));
    for (double factor : ntk)
        if (!(factor > 0)) fail("ntk", "must be positive, is " + std::to_string(factor));
    const std::vector<int64_t> shape = {grid[0] * grid[1] * grid[2], head_dim / 2};
    check(cos, DType::f32, shape);
    check(sin, DType::f32, shape);
    check_apart(sin, cos);

    const int64_t space = 2 * (head_dim / 6), time = head_dim - 2 * space;
    return {static_cast<float*>(cos.data),
            static_cast<float*>(sin.data),
            {rope_axis(grid[0], time, theta, offset[0], ntk[0]), rope_axis(grid[1], space, theta, offset[1], ntk[1]),
             rope_axis(grid[2], space, theta, offset[2], ntk[2])}};
}

Packing pack(const Array& tokens, const Array& latent, const Triple& patch) {
    const Packing packing = check_packing(tokens, latent, patch);
    check_apart(tokens, latent);
    return packing;
}

Packing unpack(const Array& latent, const Array& tokens, const Triple& patch) {
    const Packing packing = check_packing(tokens, latent, patch);
    check_apart(latent, tokens);
    return packing;
}

GuidedStep guided_step(const std::vector<Array>& state, const Array& velocity, const Array& tokens, const Array& matrix,
                       double guidance, const std::optional<Array>& known, const std::optional<Array>& clean,
                       const std::optional<Array>& noise, double clean_scale, double noise_scale) {
    const int64_t buffers = int64_t(state.size());
    if (buffers < 1 || buffers > kMaxBuffers)
        fail("state", "must be x and at most " + std::to_string(kMaxBuffers - 1) + " history buffers, has " +
                          std::to_string(buffers) + " arrays");
    check_float(velocity);
    check_layout(velocity, {kAny, kAny, kAny}, 3);
    const int64_t batch = velocity.shape[0], count = velocity.shape[1], width = velocity.shape[2];
    if (batch != 1 && batch != 2) fail("velocity", "must have 1 row, or 2 for guidance, has " + std::to_string(batch));
    for (const Array& buffer : state) check(buffer, DType::f32, {count, width});
    check_dtype(tokens, velocity.dtype);
    check_layout(tokens, {batch, count, kAny}, 1);
    if (tokens.shape[2] < width)
        fail("tokens",
             "must have at least " + std::to_string(width) + " values a token, has " + std::to_string(tokens.shape[2]));
    check(matrix, DType::f32, {buffers, buffers + 1});
    if (known) {
        check(*known, DType::f32, {count});
        if (!clean) fail("clean", "is missing: known tokens are set to it");
        check(*clean, DType::f32, {count, width});
        if (noise) check(*noise, DType::f32, {count, width});
        if (!noise && noise_scale != 0)
            fail("noise", "is missing although noise_scale is " + std::to_string(noise_scale));
    }

    for (size_t i = 0; i < state.size(); ++i) {
        for (size_t j = 0; j < i; ++j) check_apart(state[i], state[j]);
        check_apart(state[i], velocity);
        if (known) check_apart(state[i], *clean);
        if (known && noise) check_apart(state[i], *noise);
        check_apart(tokens, state[i]);
    }
    check_apart(tokens, velocity);

    GuidedStep step{};
    step.count = count;
    step.width = width;
    step.buffers = int(buffers);
    for (int row = 0; row < step.buffers; ++row) {
        step.state[row] = static_cast<float*>(state[row].data);
        std::copy_n(static_cast<const float*>(matrix.data) + row * (buffers + 1), buffers + 1, step.matrix[row]);
        for (int column = 0; column <= buffers; ++column)
            step.writes[row] |= step.matrix[row][column] != (row == column ? 1.0f : 0.0f);
        for (int column = 0; column <= buffers; ++column)
            step.reads[column] |= (step.writes[row] || row == 0) && step.matrix[row][column] != 0.0f;
    }
    step.writes[0] |= known.has_value();
    step.dtype = velocity.dtype;
    step.velocity = velocity.data;
    step.batch = int(batch);
    step.guidance = float(guidance);
    step.tokens = tokens.data;
    step.token_stride = stride_of(tokens, 1, tokens.shape[2]);
    step.batch_stride = stride_of(tokens, 0, 0);
    step.known = known ? static_cast<const float*>(known->data) : nullptr;
    step.clean = clean ? static_cast<const float*>(clean->data) : nullptr;
    step.noise = noise && noise_scale != 0 ? static_cast<const float*>(noise->data) : nullptr;
    step.clean_scale = float(clean_scale);
    step.noise_scale = float(noise_scale);
    return step;
}

}  // namespace tubelet
