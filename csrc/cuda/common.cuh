// Small functions for what the kernels need of the machine: warp reductions, asynchronous copies, matrix
// products, launches. Under P3B_CUDA_ON_CPU the language itself comes from tests/cuda_on_cpu/cuda_on_cpu.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>

#ifdef P3B_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The only shared memory of a kernel: one buffer, sized at launch.
#define P3B_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace p3b::cuda {

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, of which the compiler knows nothing here: what depends on it is not computed earlier.
template <class T>
__device__ __forceinline__ T hidden(T x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Copies 16 bytes to shared memory, or writes zeros there when not valid. `global` must be a legal address either way.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` (0 to 4) of this thread's newest groups are in flight.
__device__ __forceinline__ void cp_async_wait(int pending) {
  switch (pending) {
    case 4:
      asm volatile("cp.async.wait_group 4;" ::: "memory");
      break;
    case 3:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
}

// d[16, 8] = c + a[16, 16] * b[16, 8]
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);

#define P3B_MMA(T, NAME)                                                                                                              \
  template <>                                                                                                                         \
  __device__ __forceinline__ void mma_16816<T>(float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2], const float(&c)[4]) {      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};" \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));     \
  }
P3B_MMA(__half, "f16")
P3B_MMA(__nv_bfloat16, "bf16")
#undef P3B_MMA

// A place in shared memory, in bytes. P3B_SHARED begins at a multiple of 128.
using SharedAddress = unsigned;
__device__ __forceinline__ SharedAddress shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit values; lane i names row i % 8 of matrix i / 8.
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], SharedAddress from) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(from)
                 : "memory");
  }
}

__device__ __forceinline__ float4 load_shared(SharedAddress from) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3},[%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(from) : "memory");
  return x;
}

inline int shared_memory_limit() {
  int device = 0, bytes = 48 << 10;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

}  // namespace p3b::cuda
#endif

namespace p3b::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// d[16, 8] += a[16, 16] * b[16, 8]
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_16816<T>(d, a, b, d);
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
__device__ __forceinline__ float to_float(T x);
template <>
__device__ __forceinline__ float to_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

// Two 16-bit values in one register, the lower column in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 two = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &two, 4);
  return word;
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &two, 4);
  return word;
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  T two[2];
  memcpy(static_cast<void*>(two), &word, 4);
  return {to_float(two[0]), to_float(two[1])};
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  const uint32_t bits[2] = {word << 16, word & 0xffff0000u};
  float2 two;
  memcpy(&two, bits, 8);
  return two;
}

// Sixteen bytes as T.
template <class T>
struct alignas(16) Pack16 {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

template <class T>
__device__ __forceinline__ Pack16<T> load16(const T* p) {
  Pack16<T> pack;
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  memcpy(&pack, &raw, 16);
  return pack;
}

template <class T>
__device__ __forceinline__ void store16(T* p, const Pack16<T>& pack) {
  uint4 raw;
  memcpy(&raw, &pack, 16);
  *reinterpret_cast<uint4*>(p) = raw;
}

// Sum and maximum over groups of `width` neighbouring lanes (a power of two); every lane gets the result.
template <class T>
__device__ __forceinline__ T group_sum(T x, int width) {
  for (int i = 1; i < width; i *= 2) x += __shfl_xor_sync(kAllLanes, x, i);
  return x;
}
__device__ __forceinline__ float group_max(float x, int width) {
  for (int i = 1; i < width; i *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, i));
  return x;
}

// Two neighbouring lanes hold a 2x2 matrix of words, lane = column; afterwards lane = row. Eight channels of a row of an
// mma accumulator, and the next eight, become 8 contiguous bytes in each lane of a quad this way, 32 in all; and back.
__device__ __forceinline__ void pair_transpose(uint32_t& first, uint32_t& second) {
  const bool odd = threadIdx.x & 1;
  const uint32_t received = __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
  (odd ? first : second) = received;
}

// Calls f once for each pair of a device and a kernel, from whichever thread comes first; again where it failed.
template <class F>
cudaError_t once_per_device(int device, const void* kernel, F f) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> done;
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({device, kernel})) return cudaSuccess;
  const cudaError_t error = f();
  if (error == cudaSuccess) done.insert({device, kernel});
  return error;
}

// One dimension of blocks, so that no limit but 2^31 - 1 exists. An empty grid is no launch and no error.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks < 0 || blocks > 0x7fffffff || threads < 1 || threads > 1024) return cudaErrorInvalidConfiguration;
  const int limit = shared_memory_limit();
  if (shared_bytes > static_cast<size_t>(limit)) return cudaErrorInvalidConfiguration;
#ifdef P3B_CUDA_ON_CPU
  (void)stream;
  return launch_unchecked(blocks, threads, shared_bytes, [=] { kernel(arguments...); });
#else
  if (shared_bytes > (48 << 10)) {  // the attribute is a ceiling, not a reservation; no stream sees the call, so a capture may
    int device = 0;
    cudaGetDevice(&device);
    const void* key = reinterpret_cast<const void*>(kernel);
    const cudaError_t error =
        once_per_device(device, key, [&] { return cudaFuncSetAttribute(key, cudaFuncAttributeMaxDynamicSharedMemorySize, limit); });
    if (error != cudaSuccess) return error;
  }
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
#endif
}

}  // namespace p3b::cuda
