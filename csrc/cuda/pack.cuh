// Latents to tokens and back, in tiles of Side tokens by Side chunks. A chunk is a run of patch values where tiles have
// 16 bytes a side, else one element. The chunks of a token follow each other in its row, and a chunk of neighbouring
// tokens follow each other in the latent: both sides of a tile are vectors of Side chunks, and between them it is
// transposed in registers. A thread keeps its chunks and walks over tokens. x: chunks, y: tokens.
#pragma once

#include "../kernels.h"
#include "thread.cuh"

namespace tubelet {

template <class Chunk, int Side, bool Packs>
__device__ __forceinline__ void transpose(const Packing& packing) {
    constexpr bool kRuns = sizeof(Chunk) * Side == 16;
    const Patching& p = packing.patching;
    const int64_t chunks = kRuns ? p.runs() : p.values(), tokens = p.t * p.h * p.w;
    const int64_t size = packing.size, row_bytes = packing.stride * size;
#pragma unroll 1
    for (int64_t chunk = Side * thread_x(); chunk < chunks; chunk += Side * threads_x()) {
        int64_t lines[Side];  // where each chunk's line starts in a strip of the latent
        for (int i = 0; i < Side; ++i)
            lines[i] = size * (kRuns ? run_offset(p, chunk + i) : run_offset(p, chunk / p.pw) + chunk % p.pw);
#pragma unroll 1
        for (int64_t token = Side * thread_y(); token < tokens; token += Side * threads_y()) {
            const int64_t strip = token / p.w, w = token % p.w;
            char* const rows = packing.tokens + token * row_bytes + chunk * int64_t(sizeof(Chunk));
            char* const columns = packing.latent + (strip_offset(p, strip / p.h, strip % p.h) + w * p.pw) * size;
            Vector<Chunk, Side> from[Side], to[Side];
            for (int i = 0; i < Side; ++i)
                from[i] = load<Side>(reinterpret_cast<Chunk*>(Packs ? columns + lines[i] : rows + i * row_bytes));
            for (int i = 0; i < Side; ++i)
                for (int j = 0; j < Side; ++j) to[i].at[j] = from[j].at[i];
            for (int i = 0; i < Side; ++i)
                store(reinterpret_cast<Chunk*>(Packs ? rows + i * row_bytes : columns + lines[i]), to[i]);
        }
    }
}

template <class Chunk, int Side>
__device__ __forceinline__ void pack(const Packing& packing) {
    transpose<Chunk, Side, true>(packing);
}

template <class Chunk, int Side>
__device__ __forceinline__ void unpack(const Packing& packing) {
    transpose<Chunk, Side, false>(packing);
}

}  // namespace tubelet
