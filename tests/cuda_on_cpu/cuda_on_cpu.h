// A stand-in for the CUDA language, for tests: g++ compiles the kernels of csrc/cuda against this header.
// Blocks run one after another; the threads of a block are fibers that switch at barriers and warp collectives.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static_assert(false, "static shared memory is invisible to the stand-in: use P3B_SHARED");
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace standin {

struct Thread {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  unsigned char* shared;
  int lane, warp;
};

Thread& self();
void block_barrier(const char* where);
// Hands every lane's value (at most 64 bytes) to every lane. Only `ordered` collectives order memory.
void exchange(unsigned mask, const void* in, size_t bytes, void* out, const char* kind, bool ordered);
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
void copy_async(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int pending_groups);
[[noreturn]] void fail(const char* what);

// What the host sees of the device; a test may lower it to force another code path.
inline int shared_memory_limit = 227 * 1024;
// Blocks, and threads between two barriers, run from the first to the last, or the other way round.
inline bool falling_order = false;

template <class T>
struct Lanes {
  T of[32];
};

template <class T>
inline Lanes<T> gather(unsigned mask, const T& value, const char* kind, bool ordered = false) {
  static_assert(std::is_trivially_copyable_v<T>);
  Lanes<T> all;
  exchange(mask, &value, sizeof(T), &all, kind, ordered);
  return all;
}

inline int lane() { return self().lane; }

}  // namespace standin

#define threadIdx (standin::self().thread)
#define blockIdx (standin::self().block)
#define blockDim (standin::self().block_dim)
#define gridDim (standin::self().grid_dim)
#define P3B_SHARED(name) unsigned char* name = standin::self().shared
#define STANDIN_TEXT_(x) #x
#define STANDIN_TEXT(x) STANDIN_TEXT_(x)
#define __syncthreads() standin::block_barrier(__FILE__ ":" STANDIN_TEXT(__LINE__))

inline void __syncwarp(unsigned mask = ~0u) { standin::gather(mask, 0, "__syncwarp", true); }
template <class T>
inline T __shfl_sync(unsigned mask, T v, int source) {
  return standin::gather(mask, v, "__shfl_sync").of[source & 31];
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int other) {
  return standin::gather(mask, v, "__shfl_xor_sync").of[standin::lane() ^ other];
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, int delta) {
  auto all = standin::gather(mask, v, "__shfl_up_sync");
  return standin::lane() >= delta ? all.of[standin::lane() - delta] : v;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  auto all = standin::gather(mask, predicate, "__ballot_sync");
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= unsigned((mask >> i & 1) && all.of[i]) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
inline T __ldg(const T* p) { return *p; }

using std::max;
using std::min;

namespace p3b::cuda {

inline float fast_exp2(float x) { return std::exp2(x); }
template <class T>
inline T hidden(T x) {
  return x;
}
inline void cp_async16(void* shared, const void* global, bool valid) { standin::copy_async(shared, global, valid); }
inline void cp_async_commit() { standin::copy_async_commit(); }
inline void cp_async_wait(int pending) { standin::copy_async_wait(pending); }

// Fragments as drawn in the PTX manual under "Matrix Fragments for mma.m16n8k16".
template <class T>
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  struct Fragment { uint32_t a[4], b[2]; } mine;
  std::memcpy(mine.a, a, 16);
  std::memcpy(mine.b, b, 8);
  auto all = standin::gather(~0u, mine, "mma");
  auto half_of = [](uint32_t word, int high) {
    uint16_t bits = uint16_t(high ? word >> 16 : word);
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, 2);
    return double(float(value));
  };
  auto A = [&](int row, int k) { return half_of(all.of[row % 8 * 4 + k % 8 / 2].a[(row >= 8) + 2 * (k >= 8)], k & 1); };
  auto B = [&](int k, int col) { return half_of(all.of[col * 4 + k % 8 / 2].b[k >= 8], k & 1); };
  for (int i = 0; i < 4; i++) {
    int row = standin::lane() / 4 + i / 2 * 8, col = standin::lane() % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; k++) sum += A(row, k) * B(k, col);
    d[i] = float(sum);
  }
}

using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }
inline float4 load_shared(SharedAddress from) {
  if (from % 16) standin::fail("load_shared: address not aligned to 16 bytes");
  return *reinterpret_cast<const float4*>(from);
}

template <bool kTranspose>
inline void ldmatrix_x4(uint32_t (&d)[4], SharedAddress from) {
  auto rows = standin::gather(~0u, reinterpret_cast<const void*>(from), "ldmatrix");
  int lane = standin::lane();
  for (int m = 0; m < 4; m++) {
    uint16_t pair[2];
    for (int i = 0; i < 2; i++) {
      int row = kTranspose ? lane % 4 * 2 + i : lane / 4, col = kTranspose ? lane / 4 : lane % 4 * 2 + i;
      const void* address = rows.of[m * 8 + row];
      if (reinterpret_cast<uintptr_t>(address) % 16) standin::fail("ldmatrix: row address not aligned to 16 bytes");
      pair[i] = static_cast<const uint16_t*>(address)[col];
    }
    std::memcpy(&d[m], pair, 4);
  }
}

inline cudaError_t launch_unchecked(int64_t grid, int block, size_t shared_bytes, const std::function<void()>& kernel) {
  standin::run(dim3(unsigned(grid)), dim3(unsigned(block)), shared_bytes, kernel);
  return cudaSuccess;
}
inline int shared_memory_limit() { return standin::shared_memory_limit; }

}  // namespace p3b::cuda
