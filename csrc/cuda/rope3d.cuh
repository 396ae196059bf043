// The rotary table of a token grid: a thread keeps N neighbouring columns, whose frequencies are powers, and walks over
// tokens. x: columns, y: tokens.
#pragma once

#include "../kernels.h"
#include "thread.cuh"

namespace tubelet {

template <int N>
__device__ __forceinline__ void rope3d(const RopeTable& table) {
    const RopeAxis &t = table.axes[0], &h = table.axes[1], &w = table.axes[2];
    const int64_t vectors = table.pairs() / N, tokens = table.tokens();
#pragma unroll 1
    for (int64_t vector = thread_x(); vector < vectors; vector += threads_x()) {
        const RopeAxis* axis[N];
        double frequency[N];
        for (int i = 0; i < N; ++i) {
            const int64_t column = vector * N + i;
            const int64_t behind_t = column - t.pairs, behind_h = behind_t - h.pairs;
            axis[i] = behind_t < 0 ? &t : behind_h < 0 ? &h : &w;
            frequency[i] = rope_frequency(*axis[i], behind_t < 0 ? column : behind_h < 0 ? behind_t : behind_h);
        }
#pragma unroll 1
        for (int64_t token = thread_y(); token < tokens; token += threads_y()) {
            const int64_t row = token / w.size;
            Vector<float, N> cos, sin;
            for (int i = 0; i < N; ++i) {
                const int64_t position = axis[i] == &t ? row / h.size : axis[i] == &h ? row % h.size : token % w.size;
                const Rotation turn = rotation(rope_angle(*axis[i], position, frequency[i]));
                cos.at[i] = turn.cos;
                sin.at[i] = turn.sin;
            }
            store(table.cos + (token * vectors + vector) * N, cos);
            store(table.sin + (token * vectors + vector) * N, sin);
        }
    }
}

}  // namespace tubelet
