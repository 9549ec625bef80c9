// Runs a grid of a CUDA kernel on one CPU thread. Every CUDA thread of a block is a fiber; barriers and warp shuffles
// switch between them. Reported as errors: an access outside the registered arrays or not aligned to its width, a byte
// of global memory written twice, a barrier or shuffle that not all threads reach, shared memory beyond what the launch
// asked for, undefined behaviour (UBSan). The order in which fibers run can be changed: a missing barrier then changes
// the result. Shared memory holds NaNs when a block starts.
//
// Built with -DKERNEL_FILE="...cu" -DPARAMS=<its parameter struct>.
#include "cuda_shim.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include KERNEL_FILE

Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace passdeploy {
constexpr size_t kSharedBytes = 64 * 1024;
alignas(16) uint4 shared_memory[kSharedBytes / 16];
}  // namespace passdeploy

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kPoison = 0xff;

enum State { kReady, kAtWarp, kAtBlock, kDone };
struct Fiber {
  ucontext_t context;  // to start it
  jmp_buf resume;      // to switch to it afterwards: no system call, unlike swapcontext
  bool started;
  State state;
  float shuffled;
};
struct Region {
  uintptr_t begin, end;
  std::vector<unsigned char> reads, writes;
};

std::vector<Fiber> fibers;
std::vector<unsigned char> stacks;
ucontext_t scheduler_context;
jmp_buf scheduler;
unsigned int current;
std::vector<Region> regions;
bool anywhere;  // arrays are not registered; alignment is still checked
std::string error;
long undefined;
const void* kernel_params;
void (*kernel_body)(const void*);

void fail(const std::string& what) {
  if (!error.empty()) return;
  char where[120];
  std::snprintf(where, sizeof where, " (block %u,%u,%u thread %u)", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  error = what + where;
}

void wait(State state) {
  Fiber& me = fibers[current];
  me.state = state;
  if (_setjmp(me.resume) == 0) _longjmp(scheduler, 1);
}

// A fiber's life: one thread of every block.
void enter() {
  for (;;) {
    Fiber& me = fibers[current];
    if (_setjmp(me.resume) == 0) {
      if (me.started) _longjmp(scheduler, 1);
      me.started = true;
      swapcontext(&me.context, &scheduler_context);
    }
    kernel_body(kernel_params);
    fibers[current].state = kDone;
  }
}

void start_fibers(unsigned int count) {
  if (fibers.size() == count) return;
  fibers = std::vector<Fiber>(count);
  stacks.resize(count * kStackBytes);
  for (unsigned int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    current = i;
    swapcontext(&scheduler_context, &fiber.context);
  }
}

void resume(unsigned int i) {
  current = i;
  threadIdx = {i, 0, 0};
  if (_setjmp(scheduler) == 0) _longjmp(fibers[i].resume, 1);
}

// Order 0: rising thread numbers; 1: falling; others: shuffled by that seed, anew every round.
void order_threads(std::vector<unsigned int>& threads, unsigned int order, unsigned int& state) {
  if (order == 1) std::reverse(threads.begin(), threads.end());
  if (order < 2) return;
  for (size_t i = threads.size(); i > 1; --i) {
    state = state * 1664525u + 1013904223u;
    std::swap(threads[i - 1], threads[(state >> 8) % i]);
  }
}

// Lets waiting threads go on; false when nobody can.
bool release() {
  const size_t count = fibers.size();
  bool progress = false;
  for (size_t warp = 0; warp < count; warp += 32) {
    const size_t end = std::min(count, warp + 32);
    const auto waits = [](const Fiber& f) { return f.state == kAtWarp; };
    const auto waiting = std::count_if(fibers.begin() + warp, fibers.begin() + end, waits);
    if (waiting == 0 || static_cast<size_t>(waiting) < end - warp) continue;
    for (size_t i = warp; i < end; ++i) fibers[i].state = kReady;
    progress = true;
  }
  const auto at_block = std::count_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == kAtBlock; });
  if (static_cast<size_t>(at_block) == count) {
    for (Fiber& fiber : fibers) fiber.state = kReady;
    progress = true;
  }
  return progress;
}

void run_block(unsigned int threads, unsigned int order) {
  std::memset(passdeploy::shared_memory, kPoison, passdeploy::kSharedBytes);
  start_fibers(threads);
  for (Fiber& fiber : fibers) fiber.state = kReady;
  std::vector<unsigned int> turn(threads);
  unsigned int random = order;
  for (;;) {
    for (unsigned int i = 0; i < threads; ++i) turn[i] = i;
    order_threads(turn, order, random);
    for (unsigned int i : turn) {
      if (fibers[i].state == kReady) resume(i);
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == kDone; })) return;
    if (!release()) {
      fail("a barrier or shuffle that not all threads reach");
      fibers.clear();  // those that wait will never go on
      return;
    }
  }
}

int run_grid(Index3 grid, unsigned int threads, unsigned int shared_bytes, unsigned int order) {
  error.clear();
  undefined = 0;
  if (threads == 0 || threads > 1024 || shared_bytes > 48 * 1024 || grid.y > 65535 || grid.z > 65535) {
    error = "a launch that no GPU takes";
    return 1;
  }
  for (Region& region : regions) {
    std::fill(region.reads.begin(), region.reads.end(), 0);
    std::fill(region.writes.begin(), region.writes.end(), 0);
  }
  gridDim = grid;
  blockDim = {threads, 1, 1};
  for (unsigned int z = 0; z < grid.z; ++z) {
    for (unsigned int y = 0; y < grid.y; ++y) {
      for (unsigned int x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(threads, order);
        const auto* shared = reinterpret_cast<const unsigned char*>(passdeploy::shared_memory);
        for (size_t i = shared_bytes; i < passdeploy::kSharedBytes; ++i) {
          if (shared[i] != kPoison) {
            fail("shared memory beyond what the launch asked for");
            break;
          }
        }
        if (!error.empty()) return 1;
      }
    }
  }
  if (undefined != 0) fail("undefined behaviour, see stderr");
  return error.empty() ? 0 : 1;
}

struct Flat {
  void (*kernel)();
  const void *x, *mask, *scale, *shift, *residual;
  int elements, channels, plane, activation;
  void* y;
};

}  // namespace

void __syncthreads() { wait(kAtBlock); }

float __shfl_down_sync(unsigned int mask, float value, int offset) {
  if (mask != 0xffffffffu) fail("a shuffle with a partial mask");
  const unsigned int me = current, from = me + static_cast<unsigned int>(offset);
  fibers[me].shuffled = value;
  wait(kAtWarp);
  const float result = from / 32 == me / 32 && from < fibers.size() ? fibers[from].shuffled : value;
  wait(kAtWarp);
  return result;
}

void touch(const void* address, unsigned int bytes, bool is_write) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin % bytes != 0) fail("an access that is not aligned to its width");
  if (anywhere && begin != 0) return;
  for (Region& region : regions) {
    if (begin < region.begin || begin >= region.end) continue;
    if (begin + bytes > region.end) return fail("an access beyond the end of an array");
    std::vector<unsigned char>& counts = is_write ? region.writes : region.reads;
    for (uintptr_t i = begin - region.begin; i < begin - region.begin + bytes; ++i) {
      if (is_write && counts[i] != 0) return fail("a byte written twice");
      if (counts[i] < 255) ++counts[i];
    }
    return;
  }
  fail("an access outside every array");
}

extern "C" {

void __ubsan_on_report() { ++undefined; }

unsigned int params_size() { return sizeof(PARAMS); }

void clear_regions() {
  regions.clear();
  anywhere = false;
}

void allow_all_addresses() { anywhere = true; }

int add_region(const void* begin, size_t bytes) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(begin);
  regions.push_back({from, from + bytes, std::vector<unsigned char>(bytes), std::vector<unsigned char>(bytes)});
  return static_cast<int>(regions.size()) - 1;
}

const unsigned char* region_reads(int region) { return regions[region].reads.data(); }
const unsigned char* region_writes(int region) { return regions[region].writes.data(); }

const char* last_error() { return error.c_str(); }

// One launch of a kernel that takes one PARAMS by value; 0 when nothing was found wrong.
int emulate(void (*kernel)(PARAMS), const PARAMS* params, unsigned int x, unsigned int y, unsigned int z,
            unsigned int threads, unsigned int shared_bytes, unsigned int order) {
  static void (*chosen)(PARAMS);
  chosen = kernel;
  kernel_params = params;
  kernel_body = [](const void* p) { chosen(*static_cast<const PARAMS*>(p)); };
  return run_grid({x, y, z}, threads, shared_bytes, order);
}

// One launch of masked_affine_act_flat(_residual)_*, whose arguments are pointers and 32-bit numbers.
int emulate_flat(void (*kernel)(), const void* x, const void* mask, const void* scale, const void* shift,
                 const void* residual, int elements, int channels, int plane, int activation, void* y,
                 unsigned int blocks, unsigned int threads) {
  const Flat flat = {kernel, x, mask, scale, shift, residual, elements, channels, plane, activation, y};
  kernel_params = &flat;
  kernel_body = [](const void* p) {
    const Flat& f = *static_cast<const Flat*>(p);
    using P = const void*;
    if (f.residual == nullptr) {
      reinterpret_cast<void (*)(P, P, P, P, int, int, int, int, void*)>(f.kernel)(
          f.x, f.mask, f.scale, f.shift, f.elements, f.channels, f.plane, f.activation, f.y);
    } else {
      reinterpret_cast<void (*)(P, P, P, P, P, int, int, int, int, void*)>(f.kernel)(
          f.x, f.mask, f.scale, f.shift, f.residual, f.elements, f.channels, f.plane, f.activation, f.y);
    }
  };
  return run_grid({blocks, 1, 1}, threads, 0, 0);
}
}
