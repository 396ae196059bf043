// One pass over memory for guidance, the sampler's update, pinning of known tokens and the denoiser's next input: a
// thread reads N neighbours of one token from every buffer and only then writes, so the state is updated in place.
// Sums run in column order without fused multiply-adds: the bits are the CPU's.
#pragma once

#include "../kernels.h"
#include "thread.cuh"

namespace tubelet {

template <int N>
struct WeightedSum {
    Vector<float, N> sum{};
    bool empty = true;

    // A term whose factor is zero is not looked at, so it may hold anything.
    __device__ __forceinline__ void add(float factor, const Vector<float, N>& term) {
        if (factor == 0.0f) return;
        for (int i = 0; i < N; ++i) sum.at[i] = empty ? factor * term.at[i] : sum.at[i] + factor * term.at[i];
        empty = false;
    }
};

template <class T, int N>
__device__ __forceinline__ Vector<float, N> guided_velocity(const GuidedStep& step, int64_t at) {
    const T* const velocity = static_cast<const T*>(step.velocity) + at;
    const Vector<T, N> conditional = load<N>(velocity);
    Vector<float, N> guided;
    for (int i = 0; i < N; ++i) guided.at[i] = to_float(conditional.at[i]);
    if (step.batch == 1) return guided;
    const Vector<T, N> unconditional = load<N>(velocity + step.count * step.width);
    for (int i = 0; i < N; ++i) guided.at[i] = guide(guided.at[i], to_float(unconditional.at[i]), step.guidance);
    return guided;
}

template <int N>
__device__ __forceinline__ Vector<float, N> pinned(const GuidedStep& step, int64_t at) {
    const Vector<float, N> clean = load<N>(step.clean + at);
    Vector<float, N> result;
    if (step.noise) {
        const Vector<float, N> noise = load<N>(step.noise + at);
        for (int i = 0; i < N; ++i) result.at[i] = pin(clean.at[i], noise.at[i], step.clean_scale, step.noise_scale);
    } else {
        for (int i = 0; i < N; ++i) result.at[i] = step.clean_scale * clean.at[i];
    }
    return result;
}

template <class T, int N>
__device__ __forceinline__ void guided_step(const GuidedStep& step) {
    const int64_t elements = step.count * step.width;
#pragma unroll 1
    for (int64_t at = N * thread_x(); at < elements; at += N * threads_x()) {
        Vector<float, N> before[kMaxBuffers] = {}, velocity = {}, next = {};
        for (int i = 0; i < kMaxBuffers; ++i)
            if (i < step.buffers && step.reads[i]) before[i] = load<N>(step.state[i] + at);
        if (step.reads[step.buffers]) velocity = guided_velocity<T, N>(step, at);

        const int64_t token = at / step.width;
        for (int row = step.buffers - 1; row >= 0; --row) {  // ends with x
            if (row != 0 && !step.writes[row]) continue;
            WeightedSum<N> combined;
            for (int i = 0; i < kMaxBuffers; ++i)
                if (i < step.buffers) combined.add(step.matrix[row][i], before[i]);
            combined.add(step.matrix[row][step.buffers], velocity);
            next = row == 0 && step.known && step.known[token] != 0.0f ? pinned<N>(step, at) : combined.sum;
            if (step.writes[row]) store(step.state[row] + at, next);
        }

        Vector<T, N> cast;
        for (int i = 0; i < N; ++i) cast.at[i] = from_float<T>(next.at[i]);
        T* const tokens = static_cast<T*>(step.tokens) + token * step.token_stride + at % step.width;
        store(tokens, cast);
        if (step.batch == 2) store(tokens + step.batch_stride, cast);
    }
}

// The arguments of the step that a loop is at: a graph that was captured once reads those of every step from there.
struct GuidedStepAt {
    const GuidedStep* step;
};

template <class T, int N>
__device__ __forceinline__ void guided_step(const GuidedStepAt& at) {
    guided_step<T, N>(*at.step);
}

}  // namespace tubelet
