// The checked operations, and with them the launchers of the CPU and those for CUDA (whose kernels are compiled for the
// host), against naive loops on random shapes, dtypes and row strides, for AddressSanitizer and
// UndefinedBehaviorSanitizer to watch; then that each wrong argument is named:
//   cmake -B build -DTUBELET_TESTS=ON -DTUBELET_SANITIZE=ON && cmake --build build && ctest --test-dir build
// Buffers are exactly as large as the kernels may touch, so a step beyond them is caught.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"
#include "cuda_host.h"
#include "ops.h"

namespace {

using namespace tubelet;

std::mt19937 random_bits(1);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

float normal() { return std::normal_distribution<float>()(random_bits); }

std::vector<float> normals(int64_t size) {
    std::vector<float> values(size);
    for (float& value : values) value = normal();
    return values;
}

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

template <class T>
bool same(T one, T other) {
    return std::memcmp(&one, &other, sizeof(T)) == 0;
}

template <class T>
constexpr DType dtype_of() {
    return sizeof(T) == 4 ? DType::f32 : std::is_same_v<T, Half> ? DType::f16 : DType::bf16;
}

// Borrows `memory`; dense unless strides are given. The stride of an axis of length 1 may be anything, so it is.
template <class T>
Array array(const char* name, std::vector<T>& memory, const std::vector<int64_t>& shape,
            const std::vector<int64_t>& strides = {}, int64_t shift = 0) {
    Array result{name, memory.data() + shift, dtype_of<T>(), int(shape.size()), {}, {}};
    int64_t dense = 1;
    for (int i = result.rank - 1; i >= 0; --i) {
        result.shape[i] = shape[i];
        result.stride[i] = shape[i] == 1 ? between(-9, 9) : strides.empty() ? dense : strides[i];
        dense *= shape[i];
    }
    return result;
}

void simulate(const cuda::Launch& launch) {
    require(tubelet_cuda_host_launch(launch.symbol.c_str(), launch.grid.data(), launch.block.data(),
                                     launch.arguments.data()) == 0,
            launch.symbol.c_str());
}

struct Launchers {
    void (*rope3d)(const RopeTable&);
    void (*pack)(const Packing&);
    void (*unpack)(const Packing&);
    void (*guided_step)(const GuidedStep&);
};
constexpr Launchers kCpu = {launch_rope3d, launch_pack, launch_unpack, launch_guided_step};
constexpr Launchers kCuda = {
    [](const RopeTable& table) { simulate(cuda::launch_rope3d(table)); },
    [](const Packing& packing) { simulate(cuda::launch_pack(packing)); },
    [](const Packing& packing) { simulate(cuda::launch_unpack(packing)); },
    [](const GuidedStep& step) { simulate(cuda::launch_guided_step(step)); },
};

void test_rope3d(const Launchers& launch) {
    const Triple grid = {between(1, 6), between(1, 6), between(1, 6)};
    const int64_t head_dim = 2 * between(1, 30), space = 2 * (head_dim / 6), tokens = grid[0] * grid[1] * grid[2];
    const RealTriple offset = {normal(), 0, normal()};
    const double theta = 1e4, stretch = head_dim < 12 ? 1 : 2;
    const int64_t values[3] = {head_dim - 2 * space, space, space};
    std::vector<float> cos(tokens * head_dim / 2), sin(cos.size());

    launch.rope3d(rope3d(array("cos", cos, {tokens, head_dim / 2}), array("sin", sin, {tokens, head_dim / 2}), grid,
                         head_dim, theta, offset, {1, stretch, 1}));

    size_t at = 0;
    for (int64_t n = 0; n < tokens; ++n) {
        const int64_t position[3] = {n / grid[2] / grid[1], n / grid[2] % grid[1], n % grid[2]};
        for (int axis = 0; axis < 3; ++axis) {
            const double d = double(values[axis]);
            const double base = axis == 1 && stretch != 1 ? theta * std::pow(stretch, d / (d - 2)) : theta;
            for (int64_t i = 0; i < values[axis] / 2; ++i, ++at) {
                const double angle = (double(position[axis]) + offset[axis]) / std::pow(base, 2 * double(i) / d);
                require(std::fabs(cos[at] - std::cos(angle)) < 1e-7, "rope3d: cos");
                require(std::fabs(sin[at] - std::sin(angle)) < 1e-7, "rope3d: sin");
            }
        }
    }
}

template <class T>
void test_pack(const Launchers& launch, bool large) {
    Patching p{between(1, 20), between(1, 3), between(1, 6), between(1, 30),
               between(1, 2),  between(1, 3), between(1, 5)};
    if (large) {  // past 16 MiB, of each chunk that has a kernel of its own: 2, 4 and 8 bytes
        const int64_t pw = int64_t(1) << between(0, sizeof(T) == 2 ? 2 : 1);
        p = {8, 180 / (pw * int64_t(sizeof(T))), 67, 91, 1, 2, pw};
    }
    const int64_t aligned =
        !large && between(0, 1) ? 16 / sizeof(T) : 1;  // lines of both sides, which moves them in tiles
    if (aligned > 1) p.channels = aligned * between(1, 3), p.w = aligned * between(1, 3), p.pw = 1 << between(0, 2);
    const int64_t tokens = p.t * p.h * p.w;
    const int64_t stride = p.values() + aligned * between(0, 4), shift = aligned * between(0, 3);
    std::vector<T> latent(tokens * p.values()), packed(shift + (tokens - 1) * stride + p.values()), back(latent.size());
    for (T& value : latent) value = T(random_bits());
    const std::vector<int64_t> shape = {p.channels, p.t * p.pt, p.h * p.ph, p.w * p.pw};
    const Array rows = array("tokens", packed, {tokens, between(p.values(), stride)}, {stride, 1}, shift);

    launch.pack(pack(rows, array("latent", latent, shape), {p.pt, p.ph, p.pw}));
    launch.unpack(unpack(array("latent", back, shape), rows, {p.pt, p.ph, p.pw}));

    const T* row = packed.data() + shift;
    for (int64_t t = 0; t < p.t; ++t)
        for (int64_t h = 0; h < p.h; ++h)
            for (int64_t w = 0; w < p.w; ++w, row += stride)
                for (int64_t c = 0, k = 0; c < p.channels; ++c)
                    for (int64_t i = t * p.pt; i < (t + 1) * p.pt; ++i)
                        for (int64_t y = h * p.ph; y < (h + 1) * p.ph; ++y)
                            for (int64_t x = w * p.pw; x < (w + 1) * p.pw; ++x, ++k)
                                require(row[k] == latent[((c * shape[1] + i) * shape[2] + y) * shape[3] + x], "pack");
    require(back == latent, "unpack");
}

template <class T>
void test_guided_step(const Launchers& launch, bool large) {
    const int64_t aligned = between(0, 1) ? 8 : 1;  // rows, which moves several values at once
    const int64_t count = large ? 5003 : between(0, 40), width = aligned * (large ? 257 / aligned : between(1, 190));
    const int64_t buffers = between(1, kMaxBuffers), batch = between(1, 2), size = count * width;
    const int64_t token_stride = width + aligned * (between(0, 1) ? between(0, 5) : 0);
    const int64_t batch_stride = count * token_stride + aligned * between(0, 9);
    const float guidance = normal(), clean_scale = normal(), noise_scale = normal();
    const bool pinned = between(0, 1), noisy = between(0, 1);

    std::vector<float> matrix;
    for (int64_t row = 0; row < buffers; ++row) {
        const bool unchanged = between(0, 3) == 0;
        for (int64_t column = 0; column <= buffers; ++column)
            matrix.push_back(unchanged ? float(row == column) : between(0, 2) ? normal() : 0.0f);
    }
    std::vector<std::vector<float>> before;
    for (int64_t row = 0; row < buffers; ++row) before.push_back(normals(size));
    std::vector<std::vector<float>> state = before;
    std::vector<Array> arrays;
    for (std::vector<float>& buffer : state) arrays.push_back(array("state", buffer, {count, width}));
    std::vector<T> velocity(batch * size);
    for (T& value : velocity) value = from_float<T>(normal());
    std::vector<T> tokens(count ? (batch - 1) * batch_stride + (count - 1) * token_stride + width : 0);
    std::vector<float> known(count), clean = normals(size), noise = normals(size);
    for (float& flag : known) flag = float(between(0, 1));
    const auto given = [](bool is_given, const Array& value) { return is_given ? std::optional(value) : std::nullopt; };

    launch.guided_step(guided_step(arrays, array("velocity", velocity, {batch, count, width}),
                                   array("tokens", tokens, {batch, count, width}, {batch_stride, token_stride, 1}),
                                   array("matrix", matrix, {buffers, buffers + 1}), guidance,
                                   given(pinned, array("known", known, {count})), array("clean", clean, {count, width}),
                                   given(noisy, array("noise", noise, {count, width})), clean_scale,
                                   noisy ? noise_scale : 0.0));

    for (int64_t i = 0; i < size; ++i) {
        const float conditional = to_float(velocity[i]);
        const float v = batch == 1 ? conditional : guide(conditional, to_float(velocity[size + i]), guidance);
        for (int64_t row = 0; row < buffers; ++row) {
            const float* const factors = &matrix[row * (buffers + 1)];
            float expected = factors[buffers] * v, magnitude = std::fabs(expected);
            for (int64_t column = 0; column < buffers; ++column) {
                expected += factors[column] * before[column][i];
                magnitude += std::fabs(factors[column] * before[column][i]);
            }
            if (row == 0 && pinned && known[i / width] != 0) {
                const float level = noisy ? noise_scale * noise[i] : 0.0f;
                expected = clean_scale * clean[i] + level;
                magnitude = std::fabs(clean_scale * clean[i]) + std::fabs(level);
            }
            require(std::fabs(state[row][i] - expected) <= 1e-6f * magnitude, "guided_step: state");
        }
        const int64_t at = i / width * token_stride + i % width;
        for (int64_t b = 0; b < batch; ++b)
            require(same(tokens[b * batch_stride + at], from_float<T>(state[0][i])), "guided_step: tokens");
    }
}

void require_refused(const std::string& message, const std::function<void()>& call) {
    std::string said = "nothing";
    try {
        call();
    } catch (const ArgumentError& error) {
        said = error.what();
    }
    require(said.rfind(message, 0) == 0, ("expected '" + message + "', got '" + said + "'").c_str());
}

void test_guided_step_refuses() {
    struct Arguments {
        std::vector<Array> state;
        Array velocity, tokens, matrix;
        std::optional<Array> known, clean, noise;
    };
    std::vector<float> memory[8];
    for (std::vector<float>& values : memory) values.resize(2 * 4 * 8);
    const Arguments right = {
        {array("state[0]", memory[0], {4, 6}), array("state[1]", memory[1], {4, 6})},
        array("velocity", memory[2], {2, 4, 6}),
        array("tokens", memory[3], {2, 4, 6}, {32, 8, 1}),
        array("matrix", memory[4], {2, 3}),
        array("known", memory[5], {4}),
        array("clean", memory[6], {4, 6}),
        array("noise", memory[7], {4, 6}),
    };
    const auto step = [](const Arguments& a) {
        guided_step(a.state, a.velocity, a.tokens, a.matrix, 1.0, a.known, a.clean, a.noise, 1.0, 0.5);
    };
    const auto refused = [&](const char* message, const std::function<void(Arguments&)>& spoil) {
        Arguments wrong = right;
        spoil(wrong);
        require_refused(message, [&] { step(wrong); });
    };
    step(right);

    refused("tokens must not overlap state[0]", [](Arguments& a) { a.tokens.data = a.state[0].data; });
    refused("state[0] must not overlap velocity", [](Arguments& a) { a.velocity.data = a.state[0].data; });
    refused("state[0] must not overlap clean", [](Arguments& a) { a.clean->data = a.state[0].data; });
    refused("tokens must not overlap velocity", [](Arguments& a) { a.tokens.data = a.velocity.data; });
    refused("state must be x and at most", [](Arguments& a) { a.state.clear(); });
    refused("state must be x and at most", [](Arguments& a) { a.state.resize(kMaxBuffers + 1, a.state[0]); });
    refused("state[1] must be float32, is float16", [](Arguments& a) { a.state[1].dtype = DType::f16; });
    refused("state[1] must have shape [4, 6], has [5, 6]", [](Arguments& a) { a.state[1].shape[0] = 5; });
    refused("state[0] must be contiguous", [](Arguments& a) { a.state[0].stride[0] = 8; });
    refused("state[1] must not overlap state[0]",
            [](Arguments& a) { a.state[1].data = static_cast<float*>(a.state[0].data) + 23; });
    refused("state[0] must be aligned",
            [](Arguments& a) { a.state[0].data = static_cast<char*>(a.state[0].data) + 1; });
    refused("velocity must have shape [any, any, any], has [2, 4]", [](Arguments& a) { a.velocity.rank = 2; });
    refused("velocity must have 1 row, or 2", [](Arguments& a) { a.velocity.shape[0] = 3; });
    refused("velocity must be float32, float16 or", [](Arguments& a) { a.velocity.dtype = DType::other; });
    refused("tokens must be float32, is bfloat16", [](Arguments& a) { a.tokens.dtype = DType::bf16; });
    refused("tokens must have at least 6 values a token, has 5", [](Arguments& a) { a.tokens.shape[2] = 5; });
    refused("tokens must be contiguous in its last 1", [](Arguments& a) { a.tokens.stride[2] = 2; });
    refused("tokens must not overlap itself", [](Arguments& a) { a.tokens.stride[1] = 5; });
    refused("tokens must not overlap itself or run backwards", [](Arguments& a) { a.tokens.stride[0] = -32; });
    refused("matrix must have shape [2, 3], has [2, 2]", [](Arguments& a) { a.matrix.shape[1] = 2; });
    refused("known must have shape [4], has [5]", [](Arguments& a) { a.known->shape[0] = 5; });
    refused("clean is missing", [](Arguments& a) { a.clean.reset(); });
    refused("noise is missing although noise_scale is 0.5", [](Arguments& a) { a.noise.reset(); });
}

void test_the_others_refuse() {
    std::vector<float> memory(4 * 1 * 6 * 6), table(6 * 4), other(6 * 4);
    const Array latent = array("latent", memory, {4, 1, 6, 6}), rows = array("tokens", memory, {9, 16});
    const Array cos = array("cos", table, {6, 4}), sin = array("sin", other, {6, 4});
    const Triple patch = {1, 2, 2}, grid = {1, 2, 3};
    const RealTriple zero = {0, 0, 0}, one = {1, 1, 1};
    Array flat = latent, wide = latent, dense = rows, halves = rows, low = sin;
    flat.rank = 3;
    wide.stride[2] = 7;
    dense.stride[0] = 15;
    halves.dtype = DType::f16;
    low.dtype = DType::bf16;

    for (const bool packs : {true, false}) {
        const auto refused = [&](const char* message, const Array& tokens, const Array& image, const Triple& size) {
            require_refused(message, [&] { packs ? pack(tokens, image, size) : unpack(image, tokens, size); });
        };
        refused("latent must have shape [any, any, any, any], has [4, 1, 6]", rows, flat, patch);
        refused("latent must be contiguous", rows, wide, patch);
        refused("latent must have a number of rows that is a multiple of 4, has 6", rows, latent, {1, 4, 2});
        refused("patch must be positive, is [1, 0, 2]", rows, latent, {1, 0, 2});
        refused("tokens must have shape [36, any], has [9, 16]", rows, latent, {1, 1, 1});
        refused("tokens must have at least 16 values", array("tokens", memory, {9, 15}), latent, patch);
        refused("tokens must be float32, is float16", halves, latent, patch);
        refused("tokens must not overlap itself", dense, latent, patch);
    }
    require_refused("tokens must not overlap latent", [&] { pack(rows, latent, patch); });
    require_refused("latent must not overlap tokens", [&] { unpack(latent, rows, patch); });
    require_refused("sin must not overlap cos",
                    [&] { rope3d(cos, array("sin", table, {6, 4}), grid, 8, 1e4, zero, one); });
    require_refused("head_dim must be even", [&] { rope3d(cos, sin, grid, 7, 1e4, zero, one); });
    require_refused("grid must lie within", [&] { rope3d(cos, sin, {1, 0, 3}, 8, 1e4, zero, one); });
    require_refused("theta must be positive", [&] { rope3d(cos, sin, grid, 8, 0, zero, one); });
    require_refused("ntk must be positive", [&] { rope3d(cos, sin, grid, 8, 1e4, zero, {1, -1, 1}); });
    require_refused("ntk needs more than 2 values", [&] { rope3d(cos, sin, grid, 8, 1e4, zero, {1, 2, 1}); });
    require_refused("cos must have shape [6, 5]", [&] { rope3d(cos, sin, grid, 10, 1e4, zero, one); });
    require_refused("sin must be float32, is bfloat16", [&] { rope3d(cos, low, grid, 8, 1e4, zero, one); });
}

}  // namespace

int main() {
    for (const Launchers& launch : {kCpu, kCuda})
        for (int round = 0; round < 40; ++round) {
            const bool large = round < 4;
            test_rope3d(launch);
            test_pack<uint16_t>(launch, large);
            test_pack<uint32_t>(launch, large);
            test_guided_step<float>(launch, large);
            test_guided_step<Half>(launch, large);
            test_guided_step<BFloat>(launch, large);
        }
    test_guided_step_refuses();
    test_the_others_refuse();
    std::puts("all operations agree with their definitions and refuse wrong arguments");
}
