// The stand-in tested by itself. `self_test` runs the correct kernels; `self_test NAME` runs one planted defect,
// which must end in a wrong result (exit 1), a reported deadlock (3), a misuse (4) or a sanitizer's report.
#include "common.cuh"
#include "testing.h"

#include <atomic>
#include <thread>

using namespace p3b::cuda;

__global__ void sum_kernel(const float* x, float* out, int n, bool plant_missing_barrier) {
  P3B_SHARED(memory);
  float* partial = reinterpret_cast<float*>(memory);
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
  sum = group_sum(sum, 32);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (!plant_missing_barrier) __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) total += partial[w];
    out[blockIdx.x] = total;
  }
}

__global__ void transpose_kernel(const float* x, float* out, int n, int over_read, bool plant_missing_barrier) {
  P3B_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  for (int i = threadIdx.x; i < n * n; i += blockDim.x) tile[i] = x[i];
  if (!plant_missing_barrier) __syncthreads();
  for (int i = threadIdx.x; i < n * n; i += blockDim.x) out[i] = tile[i % n * n + i / n + over_read];
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void divergent_shuffle_kernel(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
}

// Without the barrier every lane still reads what a lane before it wrote: right in the order of the fibers, and a race.
__global__ void neighbour_kernel(float* out, bool plant_missing_syncwarp) {
  P3B_SHARED(memory);
  float* x = reinterpret_cast<float*>(memory);
  x[threadIdx.x] = float(threadIdx.x);
  if (!plant_missing_syncwarp) __syncwarp();
  out[threadIdx.x] = x[threadIdx.x ? threadIdx.x - 1 : 0];
}

// Doubles `rows` rows of 16 bytes, one row per thread and stage, through a ring of two stages.
__global__ void ring_kernel(const float* x, float* out, int rows, bool plant_no_wait, bool plant_no_release) {
  P3B_SHARED(memory);
  float* ring = reinterpret_cast<float*>(memory);
  const int t = threadIdx.x, n = blockDim.x, stages = rows / n;
  auto load = [&](int s) {
    if (s < stages) cp_async16(ring + (s % 2 * n + t) * 4, x + (s * n + t) * 4, true);
    cp_async_commit();
  };
  load(0);
  load(1);
  for (int s = 0; s < stages; s++) {
    if (!plant_no_wait) cp_async_wait(1);
    __syncthreads();
    for (int i = 0; i < 4; i++) out[(s * n + t) * 4 + i] = 2 * ring[(s % 2 * n + (t + 1) % n) * 4 + i];
    if (!plant_no_release) __syncthreads();
    load(s + 2);
  }
}

template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* out) {
  P3B_SHARED(memory);
  T* sa = reinterpret_cast<T*>(memory);
  T* sb = sa + 256;
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    sa[i] = a[i];
    sb[i] = b[i];
  }
  __syncwarp();
  uint32_t fa[4], fb[4];
  ldmatrix_x4<false>(fa, shared_address(sa + lane % 16 * 16 + lane / 16 * 8));
  ldmatrix_x4<true>(fb, shared_address(sb + lane % 16 * 16 + lane / 16 * 8));
  for (int half = 0; half < 2; half++) {
    float d[4] = {};
    const uint32_t bb[2] = {fb[2 * half], fb[2 * half + 1]};
    mma_16816<T>(d, fa, bb);
    for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

__global__ void pair_kernel(uint32_t* out) {
  uint32_t first = threadIdx.x * 2, second = threadIdx.x * 2 + 1;
  pair_transpose(first, second);
  out[threadIdx.x * 2] = first;
  out[threadIdx.x * 2 + 1] = second;
}

// Initial values that are not the accumulator.
template <class T>
__global__ void initial_kernel(float* out) {
  const uint32_t a[4] = {}, b[2] = {};
  const float lane = static_cast<float>(threadIdx.x), initial[4] = {lane, lane + 0.25f, lane + 0.5f, lane + 0.75f};
  float d[4] = {-1, -1, -1, -1};
  mma_16816<T>(d, a, b, initial);
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = d[i];
}

__global__ void misaligned_kernel(float* out) {
  P3B_SHARED(memory);
  out[threadIdx.x] = load_shared(shared_address(memory) + 4).x;
}

static void sums(bool plant) {
  std::vector<float> x(1000), out(3);
  double want = 0;
  for (size_t i = 0; i < x.size(); i++) want += x[i] = float(i % 17);
  launch(sum_kernel, 3, 128, 4 * sizeof(float), nullptr, x.data(), out.data(), int(x.size()), plant);
  for (float v : out) check_close("sum", v, want, 1e-3);
}

static void transposes(int over_read, bool plant_missing_barrier) {
  const int n = 9;
  std::vector<float> x(n * n), out(n * n);
  for (int i = 0; i < n * n; i++) x[i] = float(i);
  launch(transpose_kernel, 1, 64, sizeof(float) * n * n, nullptr, x.data(), out.data(), n, over_read,
         plant_missing_barrier);
  for (int i = 0; i < n * n && !over_read; i++) check_close("transpose", out[i], x[i % n * n + i / n], 0);
}

static void rings(bool no_wait, bool no_release) {
  const int n = 64, stages = 5;
  std::vector<Pack16<float>> x(n * stages), out(n * stages);
  for (int i = 0; i < n * stages * 4; i++) x[i / 4].at[i % 4] = float(i);
  launch(ring_kernel, 1, n, 2 * n * 16, nullptr, x[0].at, out[0].at, n * stages, no_wait, no_release);
  for (int r = 0; r < n * stages; r++)
    for (int i = 0; i < 4; i++) check_close("ring", out[r].at[i], 2 * x[r / n * n + (r + 1) % n].at[i], 0);
}

template <class T>
static void products() {
  Random random(3);
  std::vector<T> a(256), b(256);
  for (int i = 0; i < 256; i++) {
    a[i] = from_float<T>(random.normal());
    b[i] = from_float<T>(random.normal());
  }
  std::vector<float> out(256);
  launch(mma_kernel<T>, 1, 32, 1024, nullptr, a.data(), b.data(), out.data());
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) {
      double want = 0;
      for (int k = 0; k < 16; k++) want += double(to_float(a[i * 16 + k])) * to_float(b[k * 16 + j]);
      check_close("mma", out[i * 16 + j], want, 1e-5);
    }
}

static void neighbours(bool plant) {
  std::vector<float> out(32);
  launch(neighbour_kernel, 1, 32, 128, nullptr, out.data(), plant);
  for (int i = 0; i < 32; i++) check_close("neighbour", out[i], i ? i - 1 : 0, 0);
}

// Threads that launch the same kernels: the first for each device and kernel makes the call, and again after an error.
static void once() {
  std::vector<std::atomic<int>> calls(6);
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; t++)
    threads.emplace_back([&] {
      for (int i = 0; i < 600; i++)
        once_per_device(i % 2, &calls[i % 6], [&] { return calls[i % 6]++ || i % 6 ? cudaSuccess : cudaErrorUnknown; });
    });
  for (auto& t : threads) t.join();
  for (int i = 0; i < 6; i++) check_close("once per device and kernel", calls[i], i ? 1 : 2, 0);
}

int main(int argc, char** argv) {
  const std::string plant = argc > 1 ? argv[1] : "";
  if (plant == "missing_barrier") sums(true);
  else if (plant == "missing_barrier_transpose") transposes(0, true);
  else if (plant == "over_read") transposes(1, false);
  else if (plant == "missing_wait") rings(true, false);
  else if (plant == "overwritten_stage") rings(false, true);
  else if (plant == "missing_syncwarp") neighbours(true);
  else if (plant == "divergent_barrier") launch(divergent_barrier_kernel, 1, 64, 0, nullptr);
  else if (plant == "misaligned") {
    std::vector<float> out(1);
    launch(misaligned_kernel, 1, 1, 64, nullptr, out.data());
  } else if (plant == "divergent_shuffle") {
    std::vector<float> out(32);
    launch(divergent_shuffle_kernel, 1, 32, 0, nullptr, out.data());
  } else if (plant.empty() || plant == "small" || plant == "medium") {
    sums(false);
    transposes(0, false);
    rings(false, false);
    products<__half>();
    products<__nv_bfloat16>();
    neighbours(false);
    std::vector<uint32_t> pairs(64);
    launch(pair_kernel, 1, 32, 0, nullptr, pairs.data());
    for (int t = 0; t < 32; t++)
      for (int i = 0; i < 2; i++) check_close("pair_transpose", pairs[t * 2 + i], (t / 2 * 2 + i) * 2 + t % 2, 0);
    std::vector<float> initial(128);
    launch(initial_kernel<__half>, 1, 32, 0, nullptr, initial.data());
    for (int i = 0; i < 128; i++) check_close("mma: initial values", initial[i], i / 4 + i % 4 * 0.25, 0);
    once();
    auto nothing = [](auto kernel, int64_t blocks, int threads, size_t bytes) {
      return launch(kernel, blocks, threads, bytes, nullptr);
    };
    check_true("empty grid", nothing(divergent_barrier_kernel, 0, 64, 0) == cudaSuccess);
    check_true("grid limit", nothing(divergent_barrier_kernel, int64_t(1) << 31, 64, 0) != cudaSuccess);
    check_true("shared limit", nothing(divergent_barrier_kernel, 1, 64, size_t(1) << 20) != cudaSuccess);
  } else {
    fprintf(stderr, "no defect named %s\n", plant.c_str());
    return 2;
  }
  return finish("self_test");
}
