// What one element costs: number formats, index maps and arithmetic, shared by the CPU and CUDA kernels.
//
// Nothing here knows of threads, vectors, Python or how arrays are checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TUBELET_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TUBELET_HD inline __attribute__((always_inline))
#else
#define TUBELET_HD inline
#endif

#if defined(__GNUC__)
#define TUBELET_INLINE_LAMBDA __attribute__((always_inline))
#else
#define TUBELET_INLINE_LAMBDA
#endif

namespace tubelet {

// ---- number formats: float32 is computed with, the two 16-bit formats are only stored ----

struct Half {  // IEEE binary16
    uint16_t bits;
};
struct BFloat {  // the upper half of a float32
    uint16_t bits;
};

TUBELET_HD uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

TUBELET_HD float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

TUBELET_HD float to_float(float value) { return value; }

TUBELET_HD float to_float(BFloat value) { return float_of(uint32_t(value.bits) << 16); }

TUBELET_HD float to_float(Half value) {
    const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & 0x0f800000u;
    const float normal = float_of(magnitude + (112u << 23));                            // rebias 15 -> 127
    const float special = float_of(magnitude + (224u << 23));                           // infinity and NaN
    const float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);  // renormalised by the FPU
    const float result = exponent == 0x0f800000u ? special : exponent == 0 ? subnormal : normal;
    return float_of(bits_of(result) | (value.bits & 0x8000u) << 16);
}

// Rounding is half to even; a NaN becomes a quiet NaN of its sign.
template <class T>
TUBELET_HD T from_float(float value);

template <>
TUBELET_HD float from_float<float>(float value) {
    return value;
}

template <>
TUBELET_HD BFloat from_float<BFloat>(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16 & 0x8000u) | 0x7fc0u;
    return BFloat{uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

template <>
TUBELET_HD Half from_float<Half>(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Adding 0.5 aligns a subnormal result's last bit with the sum's last bit, so the FPU rounds it.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // from 2^16 on, and NaN
    const uint32_t result = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? subnormal : normal;
    return Half{uint16_t(result | (bits >> 16 & 0x8000u))};
}

// ---- rope3d ----

struct RopeAxis {
    int64_t size;   // positions along the axis
    int64_t pairs;  // columns: half of the head's values that rotate with this axis
    double theta;
    double offset;
};

// Column i of an axis of d = 2 * pairs values turns by theta^(-2i/d) a position (RoFormer, eq. 15).
TUBELET_HD double rope_frequency(const RopeAxis& axis, int64_t column) {
    return 1.0 / pow(axis.theta, double(column) / double(axis.pairs));
}

TUBELET_HD double rope_angle(const RopeAxis& axis, int64_t position, double frequency) {
    return (double(position) + axis.offset) * frequency;
}

struct Rotation {
    float cos, sin;
};

// Computed in float64 and rounded once.
TUBELET_HD Rotation rotation(double angle) {
#if defined(__CUDA_ARCH__)
    // In half turns, because sin and cos reduce large angles in local memory.
    double sine, cosine;
    sincospi(angle * 0.31830988618379067, &sine, &cosine);
    return {float(cosine), float(sine)};
#else
    return {float(std::cos(angle)), float(std::sin(angle))};
#endif
}

// ---- pack and unpack ----

// A token is the patch [channels, pt, ph, pw] of a latent [channels, t*pt, h*ph, w*pw], flattened. Its values come in
// `runs()` runs of pw, each of which is contiguous in the latent too.
struct Patching {
    int64_t channels;
    int64_t t, h, w;
    int64_t pt, ph, pw;

    TUBELET_HD int64_t runs() const { return channels * pt * ph; }
    TUBELET_HD int64_t values() const { return runs() * pw; }
};

// Where the first run of the tokens (t, h, 0...w) starts in the latent.
TUBELET_HD int64_t strip_offset(const Patching& p, int64_t t, int64_t h) {
    return (t * p.pt * p.h + h) * p.ph * p.w * p.pw;
}

// How far run `run` of a token lies behind its first run.
TUBELET_HD int64_t run_offset(const Patching& p, int64_t run) {
    const int64_t row = run % p.ph, frame = run / p.ph % p.pt, channel = run / p.ph / p.pt;
    return ((channel * p.t * p.pt + frame) * p.h * p.ph + row) * p.w * p.pw;
}

// ---- guided_step ----

// Classifier-free guidance (Ho & Salimans 2022) as a blend from the unconditional to the conditional velocity.
TUBELET_HD float guide(float conditional, float unconditional, float guidance) {
    return unconditional + guidance * (conditional - unconditional);
}

// A known token at the noise level of the next step.
TUBELET_HD float pin(float clean, float noise, float clean_scale, float noise_scale) {
    return clean_scale * clean + noise_scale * noise;
}

}  // namespace tubelet
