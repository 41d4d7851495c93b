// Fibers behind cuda_on_cpu.h. Never instrumented by ThreadSanitizer (it would see the scheduler as a race),
// so it uses plain arrays and volatile copies: an inlined template or memcpy could be the instrumented one.
#include "cuda_on_cpu.h"

#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef STANDIN_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

namespace standin {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kMaxCopies = 4096;

struct Copy {
  void* shared;
  const void* global;
  bool valid;
  long group;
};

struct Fiber {
  Thread thread;
  ucontext_t context;
  char* stack;
  bool waiting, done;
  const char* where;
  void *fake_stack, *tsan;
  Copy* copies;
  int num_copies;
  long group;
};

// Two sets of slots: a lane may reach the next collective while others still read the last one, never two ahead.
struct Warp {
  uint64_t slot[2][32][8];
  long generation;
  int arrived;
  unsigned mask;
  const char* kind;
};

Fiber fibers[1024];
Warp warps[32];
Fiber* current;
int num_fibers, alive, at_barrier;
const std::function<void()>* body;
ucontext_t home;
void *home_fake_stack, *home_tsan;
const void* home_bottom;
size_t home_bytes;
long barrier_generation;
uint64_t start_tag, end_tag, barrier_tag[2], warp_tag[32][2];  // addresses that carry ThreadSanitizer's happens-before

// Called through pointers, so that the sanitizers' versions run and not 16 bytes moved in place.
void* (*volatile copy_bytes)(void*, const void*, size_t) = memcpy;
void* (*volatile fill_bytes)(void*, int, size_t) = memset;

void switch_to(ucontext_t* from, ucontext_t* to, void** save, const void* bottom, size_t bytes, void* tsan) {
  (void)save, (void)bottom, (void)bytes, (void)tsan;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, bytes);
#endif
#ifdef STANDIN_TSAN
  __tsan_switch_to_fiber(tsan, 1);  // 1: the switch itself synchronises nothing
#endif
  swapcontext(from, to);
}

void arrived(void* fake_stack, const void** bottom, size_t* bytes) {
  (void)fake_stack, (void)bottom, (void)bytes;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, bottom, bytes);
#endif
}

void leave() {
  Fiber* f = current;
  switch_to(&f->context, &home, &f->fake_stack, home_bottom, home_bytes, home_tsan);
  arrived(f->fake_stack, nullptr, nullptr);
}

void wait_at(const char* where) {
  current->waiting = true;
  current->where = where;
  leave();
  current->where = nullptr;
}

void fiber_main() {
  arrived(nullptr, &home_bottom, &home_bytes);
  for (;;) {  // one round per block: fibers are expensive under ThreadSanitizer, so they are reused
    __tsan_acquire(&start_tag);
    (*body)();
    __tsan_release(&end_tag);
    current->done = true;
    alive--;
    leave();
  }
}

void report_deadlock() {
  fprintf(stderr, "cuda_on_cpu: deadlock in block %u: %d of %d threads left the kernel\n", current->thread.block.x,
          num_fibers - alive, num_fibers);
  for (int i = 0; i < num_fibers; i++) {
    if (fibers[i].done) continue;
    int same = 0;
    bool first = true;
    for (int j = 0; j < num_fibers; j++) {
      if (fibers[j].done || fibers[j].where != fibers[i].where) continue;
      if (j < i) first = false;
      same++;
    }
    if (first) fprintf(stderr, "  %d threads, the first is %d, wait at %s\n", same, i, fibers[i].where);
  }
  exit(3);
}

void run_block(uint3 block, dim3 grid, dim3 block_dim, size_t shared_bytes) {
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, shared_bytes ? shared_bytes : 1)) fail("out of memory");
  for (size_t i = 0; i < shared_bytes; i++) static_cast<volatile unsigned char*>(shared)[i] = 0xff;  // NaN, -1
  at_barrier = 0;
  alive = num_fibers;
  for (auto& w : warps) w.arrived = 0;
  for (int t = 0; t < num_fibers; t++) {
    Fiber& f = fibers[t];
    f.done = f.waiting = false;
    f.where = nullptr;
    f.num_copies = 0;
    f.group = 0;
    f.thread = Thread{{unsigned(t), 0, 0}, block, block_dim, grid, static_cast<unsigned char*>(shared), t % 32, t / 32};
  }
  __tsan_release(&start_tag);
  while (alive) {
    bool progress = false;
    for (int i = 0; i < num_fibers; i++) {
      Fiber& f = fibers[falling_order ? num_fibers - 1 - i : i];
      if (f.done || f.waiting) continue;
      progress = true;
      current = &f;
      switch_to(&home, &f.context, &home_fake_stack, f.stack, kStackBytes, f.tsan);
      arrived(home_fake_stack, nullptr, nullptr);
    }
    if (!progress) report_deadlock();
  }
  __tsan_acquire(&end_tag);
  free(shared);
}

}  // namespace

void fail(const char* what) {
  fprintf(stderr, "cuda_on_cpu: block %u thread %u: %s\n", current->thread.block.x, current->thread.thread.x, what);
  exit(4);
}

Thread& self() { return current->thread; }

void block_barrier(const char* where) {
  uint64_t* tag = &barrier_tag[barrier_generation & 1];
  __tsan_release(tag);
  if (++at_barrier == num_fibers) {
    at_barrier = 0;
    barrier_generation++;
    for (int t = 0; t < num_fibers; t++) fibers[t].waiting = false;
  } else {
    wait_at(where);
  }
  __tsan_acquire(tag);
}

void exchange(unsigned mask, const void* in, size_t bytes, void* out, const char* kind, bool ordered) {
  Fiber* f = current;
  const int w = f->thread.warp;
  Warp& warp = warps[w];
  if (bytes > sizeof(warp.slot[0][0])) fail("exchange: value larger than a slot");
  if (!(mask >> f->thread.lane & 1)) fail("a lane calls a collective that its mask leaves out");
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.kind = kind;
  }
  if (warp.mask != mask) fail("lanes of one warp name different masks");
  if (strcmp(warp.kind, kind)) fail("lanes of one warp meet at different collectives");
  const int set = warp.generation & 1;
  auto* slot = reinterpret_cast<volatile unsigned char*>(warp.slot[set][f->thread.lane]);
  for (size_t i = 0; i < bytes; i++) slot[i] = static_cast<const unsigned char*>(in)[i];
  if (ordered) __tsan_release(&warp_tag[w][set]);
  if (++warp.arrived == __builtin_popcount(mask)) {
    warp.arrived = 0;
    warp.generation++;
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) fibers[w * 32 + i].waiting = false;
  } else {
    wait_at(kind);
  }
  if (ordered) __tsan_acquire(&warp_tag[w][set]);
  for (int i = 0; i < 32; i++) {
    auto* from = reinterpret_cast<volatile unsigned char*>(warp.slot[set][i]);
    for (size_t j = 0; j < bytes; j++) static_cast<volatile unsigned char*>(out)[i * bytes + j] = from[j];
  }
}

// A copy lands when the thread waits for it. Until then its target is poison: a read sees NaN, and
// ThreadSanitizer sees a write at the moment of the issue, when other threads may still be reading.
void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16) fail("cp.async: shared address not aligned to 16 bytes");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16) fail("cp.async: global address not aligned to 16 bytes");
  Fiber* f = current;
  if (f->num_copies == kMaxCopies) fail("too many cp.async in flight");
  fill_bytes(shared, 0xff, 16);
  f->copies[f->num_copies++] = {shared, global, valid, f->group};
}

void copy_async_commit() { current->group++; }

void copy_async_wait(int pending_groups) {
  Fiber* f = current;
  int kept = 0;
  for (int i = 0; i < f->num_copies; i++) {
    Copy c = f->copies[i];
    if (c.group >= f->group - pending_groups) f->copies[kept++] = c;
    else if (c.valid) copy_bytes(c.shared, c.global, 16);
    else fill_bytes(c.shared, 0, 16);
  }
  f->num_copies = kept;
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const int n = int(block.x * block.y * block.z);
  if (n < 1 || n > 1024 || block.x != unsigned(n)) {
    fprintf(stderr, "cuda_on_cpu: blocks have one dimension of 1 to 1024 threads\n");
    exit(4);
  }
  num_fibers = n;
  body = &kernel;
#ifdef STANDIN_TSAN
  home_tsan = __tsan_get_current_fiber();
#endif
  for (int t = 0; t < n; t++) {
    Fiber& f = fibers[t];
    if (f.stack) continue;
    f.stack = static_cast<char*>(malloc(kStackBytes));
    f.copies = static_cast<Copy*>(malloc(kMaxCopies * sizeof(Copy)));
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
#ifdef STANDIN_TSAN
    f.tsan = __tsan_create_fiber(0);
#endif
  }
  for (unsigned x = 0; x < grid.x; x++) run_block({falling_order ? grid.x - 1 - x : x, 0, 0}, grid, block, shared_bytes);
}

}  // namespace standin
