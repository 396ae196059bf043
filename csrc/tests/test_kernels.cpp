// The launchers against naive loops on random shapes, for AddressSanitizer and UndefinedBehaviorSanitizer to watch:
//   cmake -B build -DTUBELET_TESTS=ON -DTUBELET_SANITIZE=ON && cmake --build build && ctest --test-dir build
// Buffers are exactly as large as the kernels may touch, so a step beyond them is caught.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels.h"

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

void test_rope3d() {
    const RopeAxis axes[3] = {{between(1, 6), between(1, 9), 1e4, normal()},
                              {between(1, 6), between(0, 9), 1e3, normal()},
                              {between(1, 6), between(1, 9), 1e4, 0.0}};
    const int64_t pairs = axes[0].pairs + axes[1].pairs + axes[2].pairs;
    std::vector<float> cos(axes[0].size * axes[1].size * axes[2].size * pairs), sin(cos.size());

    launch_rope3d(cos.data(), sin.data(), axes);

    size_t at = 0;
    for (int64_t t = 0; t < axes[0].size; ++t)
        for (int64_t h = 0; h < axes[1].size; ++h)
            for (int64_t w = 0; w < axes[2].size; ++w) {
                const int64_t position[3] = {t, h, w};
                for (int axis = 0; axis < 3; ++axis)
                    for (int64_t i = 0; i < axes[axis].pairs; ++i, ++at) {
                        const double angle = rope_angle(axes[axis], position[axis], i);
                        require(same(cos[at], float(std::cos(angle))), "rope3d: cos");
                        require(same(sin[at], float(std::sin(angle))), "rope3d: sin");
                    }
            }
}

template <class T>
void test_pack(bool large) {
    Patching p{between(1, 20), between(1, 3), between(1, 6), between(1, 30),
               between(1, 2),  between(1, 3), between(1, 5)};
    if (large) {  // past 16 MiB, of each chunk that has a kernel of its own: 2, 4 and 8 bytes
        const int64_t pw = int64_t(1) << between(0, sizeof(T) == 2 ? 2 : 1);
        p = {8, 180 / (pw * int64_t(sizeof(T))), 67, 91, 1, 2, pw};
    }
    const int64_t tokens = p.t * p.h * p.w, stride = p.values() + between(0, 4), shift = between(0, 3);
    std::vector<T> latent(tokens * p.values()), packed(shift + (tokens - 1) * stride + p.values()), back(latent.size());
    for (T& value : latent) value = T(random_bits());

    launch_pack(packed.data() + shift, stride, latent.data(), p, sizeof(T));
    launch_unpack(back.data(), packed.data() + shift, stride, p, sizeof(T));

    for (int64_t n = 0; n < tokens; ++n)
        for (int64_t k = 0; k < p.values(); ++k)
            require(packed[shift + n * stride + k] == latent[latent_index(p, n, k)], "pack");
    require(back == latent, "unpack");
}

template <class T>
void test_guided_step(DType dtype, bool large) {
    GuidedStep step{};
    step.count = large ? 5003 : between(0, 40);
    step.width = large ? 257 : between(1, 2500);
    step.buffers = int(between(1, kMaxBuffers));
    step.dtype = dtype;
    step.batch = int(between(1, 2));
    step.guidance = normal();
    step.token_stride = step.width + (between(0, 1) ? between(0, 5) : 0);
    step.batch_stride = step.count * step.token_stride;
    step.clean_scale = normal();
    step.noise_scale = normal();
    const int64_t size = step.count * step.width;

    std::vector<std::vector<float>> before;
    for (int row = 0; row < step.buffers; ++row) {
        before.push_back(normals(size));
        const bool unchanged = between(0, 3) == 0;
        for (int column = 0; column <= step.buffers; ++column)
            step.matrix[row][column] = unchanged ? float(row == column) : between(0, 2) ? normal() : 0.0f;
    }
    std::vector<std::vector<float>> state = before;
    for (int row = 0; row < step.buffers; ++row) step.state[row] = state[row].data();
    std::vector<T> velocity(step.batch * size), tokens(step.batch * step.batch_stride);
    for (T& value : velocity) value = from_float<T>(normal());
    std::vector<float> known(step.count), clean = normals(size), noise = normals(size);
    for (float& flag : known) flag = float(between(0, 1));
    step.velocity = velocity.data();
    step.tokens = tokens.data();
    step.known = between(0, 1) ? known.data() : nullptr;
    step.clean = clean.data();
    step.noise = between(0, 1) ? noise.data() : nullptr;

    launch_guided_step(step);

    for (int64_t i = 0; i < size; ++i) {
        const float conditional = to_float(velocity[i]);
        const float v = step.batch == 1 ? conditional : guide(conditional, to_float(velocity[size + i]), step.guidance);
        for (int row = 0; row < step.buffers; ++row) {
            float expected = step.matrix[row][step.buffers] * v, magnitude = std::fabs(expected);
            for (int column = 0; column < step.buffers; ++column) {
                expected += step.matrix[row][column] * before[column][i];
                magnitude += std::fabs(step.matrix[row][column] * before[column][i]);
            }
            if (row == 0 && step.known && known[i / step.width] != 0) {
                const float level = step.noise ? step.noise_scale * noise[i] : 0.0f;
                expected = step.clean_scale * clean[i] + level;
                magnitude = std::fabs(step.clean_scale * clean[i]) + std::fabs(level);
            }
            require(std::fabs(state[row][i] - expected) <= 1e-6f * magnitude, "guided_step: state");
        }
        const int64_t at = i / step.width * step.token_stride + i % step.width;
        for (int b = 0; b < step.batch; ++b)
            require(same(tokens[b * step.batch_stride + at], from_float<T>(state[0][i])), "guided_step: tokens");
    }
}

}  // namespace

int main() {
    for (int round = 0; round < 40; ++round) {
        const bool large = round < 4;
        test_rope3d();
        test_pack<uint16_t>(large);
        test_pack<uint32_t>(large);
        test_guided_step<float>(DType::f32, large);
        test_guided_step<Half>(DType::f16, large);
        test_guided_step<BFloat>(DType::bf16, large);
    }
    std::puts("all kernels agree with their definitions");
}
