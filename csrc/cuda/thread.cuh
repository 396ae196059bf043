// What every kernel starts from: its place in the grid, and neighbours in memory moved at once.
#pragma once

#include <cstdint>

namespace tubelet {

// Kernels stride by the whole grid, so a grid of any size does all of the work.
__device__ __forceinline__ int64_t thread_x() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t thread_y() { return int64_t(blockIdx.y) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t threads_x() { return int64_t(gridDim.x) * blockDim.x; }
__device__ __forceinline__ int64_t threads_y() { return int64_t(gridDim.y) * blockDim.y; }

// Moved by accesses of 16 bytes where it has as many, and aligned to one access.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T at[N];
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
    return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& vector) {
    *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

}  // namespace tubelet
