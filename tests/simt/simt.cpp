// The scheduler: which fiber runs, what it waits for, and what is wrong when nobody can run.
#include "simt/simt.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <bitset>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simt/fiber.h"
#include "simt/shared_memory.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace bigkern::simt {
namespace {

constexpr int kNamedBarriers = 16;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// xorshift64*: good enough to shuffle a schedule, and almost free.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u | 1u) {}
  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return uint32_t(state_ * 0x2545f4914f6cdd1du >> 32);
  }
  // One of the bits that are set.
  int bit_of(uint32_t mask) {
    const int turn = int(next() & 31u);
    const uint32_t turned = mask >> turn | mask << (-turn & 31);
    return (__builtin_ctz(turned) + turn) & 31;
  }

 private:
  uint64_t state_;
};

// What a thread that does not run is waiting for.
enum class Wait { nothing, warp_op, block_barrier, named_barrier, counter, exited };

struct Copy {
  void* destination;
  const void* source;
  int bytes;
  bool valid;
  int group;  // how many groups the thread had committed before this copy was issued
};

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index = {};
  int warp = 0;
  int lane = 0;

  Wait wait = Wait::nothing;
  const char* wait_name = "";  // for reports: the operation, its mask or number, its place
  uint32_t wait_argument = 0;
  Site wait_site = {};
  const unsigned* counter = nullptr;  // what Wait::counter waits for, until it is wait_argument

  std::vector<Copy> copies;  // in flight, oldest first
  int committed_groups = 0;
};

// Lanes on their way to the same warp operation.
struct Rendezvous {
  uint32_t arrived = 0;
  uint32_t mask;
  const char* name;
  ExecuteWarp execute;
  Site site;
  void* operands[warpSize];
};

struct Warp {
  uint32_t ready = 0;             // lanes that can run
  uint32_t exited = 0;            // lanes that are done, or that the block never had
  uint32_t at_block_barrier = 0;  // lanes that wait for __syncthreads
  Rendezvous pending[warpSize];   // those with arrived == 0 are free
};

struct BlockBarrier {
  int waiting = 0;
  int predicates = 0;
  const char* name;
  Site site;
  BarrierResult result;  // of the last time it opened
};

struct NamedBarrier {
  int expected = 0;
  int arrived = 0;
  std::bitset<kMaxThreads> who;      // arrived in this phase
  uint32_t waiting[kMaxWarps] = {};  // the lanes among them that wait
};

// A block that runs, or, in a cooperative launch, one of those that are alive at once.
struct Block {
  uint3 index = {};
  int first_thread = 0;      // of the machine's threads
  int live = 0;              // threads that have not exited
  uint32_t ready_warps = 0;  // warps with a lane that can run
  Warp warps[kMaxWarps];
  BlockBarrier barrier;
  NamedBarrier named_barriers[kNamedBarriers];
  SharedMemory dynamic_smem;
};

std::string to_string(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

std::string to_string(Site site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

// Empty when the linker kept no symbol for the kernel.
std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) {
    return "";
  }
  int status = 0;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : info.dli_sname;
  free(readable);
  return name;
}

// ---- the machine -------------------------------------------------------------------------------

// One processor that runs one thread at a time: of one block after the other, or, in a cooperative
// launch, of any block of the grid.
class Machine {
 public:
  void set_seed(uint64_t seed) { seed_ = seed; }

  void run_grid(const Launch& launch) {
    launch_ = &launch;
    gridDim = launch.grid;
    blockDim = launch.block;
    random_ = Random(seed_);
    static_smem_.find();
    thread_count_ = int(blockDim.x * blockDim.y * blockDim.z);
    warp_count_ = (thread_count_ + warpSize - 1) / warpSize;
    const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
    allocate(launch.cooperative ? size_t(blocks) : 1);

    // Every block once, in an order that no kernel may rely on: a step that has no divisor in
    // common with the number of blocks visits them all.
    uint64_t step = blocks > 2 ? 1 + random_.next() % (blocks - 1) : 1;
    while (std::gcd(step, blocks) != 1) ++step;
    uint64_t at = random_.next() % blocks;
    alive_ = 0;
    for (uint64_t i = 0; i < blocks; ++i, at = (at + step) % blocks) {
      start_block(*blocks_[alive_++],
                  {unsigned(at % gridDim.x), unsigned(at / gridDim.x % gridDim.y),
                   unsigned(at / gridDim.x / gridDim.y)});
      if (launch.cooperative && i + 1 < blocks) continue;
      run_blocks();
      alive_ = 0;
    }
  }

  // ---- what a running thread can ask for -------------------------------------------------------

  // Unwinds the thread, or the scheduler, that notices.
  [[noreturn]] void fault(const std::string& what) const {
    std::string message = "kernel " + describe_kernel() + ", block " + to_string(blockIdx);
    if (current_ != nullptr) message += ", thread " + to_string(current_->index);
    throw Fault(message + ": " + what);
  }

  void warp_op(const char* name, uint32_t mask, void* operands, ExecuteWarp execute, Site site) {
    Thread& self = *current_;
    Warp& warp = block_->warps[self.warp];
    const uint32_t bit = 1u << self.lane;
    if ((mask & bit) == 0) {
      fault(std::string(name) + " at " + to_string(site) + ": the mask " + hex(mask) +
            " does not name the calling lane " + std::to_string(self.lane));
    }
    if ((mask & warp.exited) != 0) {
      fault("divergence: " + std::string(name) + " at " + to_string(site) + ": the mask " +
            hex(mask) +
            " names lanes that have exited or do not exist: " + hex(mask & warp.exited));
    }

    Rendezvous& meeting = find_rendezvous(warp, mask);
    if (meeting.arrived == 0) {
      meeting.mask = mask;
      meeting.name = name;
      meeting.execute = execute;
      meeting.site = site;
    } else if (meeting.execute != execute || !same(meeting.site, site)) {
      fault("divergence: the lane comes to " + std::string(name) + " at " + to_string(site) +
            " while lanes " + hex(meeting.arrived) + " of its warp wait at " + meeting.name +
            " at " + to_string(meeting.site));
    }
    meeting.operands[self.lane] = operands;
    meeting.arrived |= bit;
    if (meeting.arrived != mask) {
      wait(Wait::warp_op, name, mask, site);
      return;
    }
    execute(meeting.operands, mask);
    meeting.arrived = 0;
    warp.ready |= mask & ~bit;
    block_->ready_warps |= 1u << self.warp;
  }

  BarrierResult block_barrier(const char* name, bool predicate, Site site) {
    BlockBarrier& barrier = block_->barrier;
    if (barrier.waiting == 0) {
      barrier.predicates = 0;
      barrier.name = name;
      barrier.site = site;
    } else if (!same(barrier.site, site)) {
      fault("divergence: the thread comes to " + std::string(name) + " at " + to_string(site) +
            " while " + std::to_string(barrier.waiting) + " threads of its block wait at " +
            barrier.name + " at " + to_string(barrier.site));
    }
    barrier.predicates += predicate;
    barrier.waiting += 1;
    block_->warps[current_->warp].at_block_barrier |= 1u << current_->lane;
    if (!open_block_barrier_if_complete()) wait(Wait::block_barrier, name, 0, site);
    return barrier.result;
  }

  void named_barrier(int id, int threads, bool waits, Site site) {
    const char* name = waits ? "named_barrier_sync" : "named_barrier_arrive";
    if (id < 1 || id >= kNamedBarriers || threads < warpSize || threads % warpSize != 0 ||
        threads > thread_count_) {
      fault(std::string(name) + "(" + std::to_string(id) + ", " + std::to_string(threads) +
            ") at " + to_string(site) + ": the id is 1 to 15, the threads a multiple of 32 and " +
            "no more than the block has");
    }
    NamedBarrier& barrier = block_->named_barriers[id];
    const int rank = current_->warp * warpSize + current_->lane;
    if (barrier.arrived == 0) barrier.expected = threads;
    if (barrier.expected != threads || barrier.who[rank]) {
      fault(std::string(name) + "(" + std::to_string(id) + ", " + std::to_string(threads) +
            ") at " + to_string(site) +
            (barrier.who[rank] ? ": the thread arrives twice before the barrier has opened"
                               : ": other threads expect " + std::to_string(barrier.expected)));
    }
    barrier.who.set(rank);
    barrier.arrived += 1;
    if (barrier.arrived == barrier.expected) {
      for (int i = 0; i < warp_count_; ++i)
        make_ready(*block_, i, std::exchange(barrier.waiting[i], 0));
      barrier.arrived = 0;
      barrier.who.reset();
    } else if (waits) {
      barrier.waiting[current_->warp] |= 1u << current_->lane;
      wait(Wait::named_barrier, name, uint32_t(id), site);
    }
  }

  void async_copy(void* destination, const void* source, int bytes, bool valid, Site site) {
    check_aligned(destination, bytes, site);
    if (valid) check_aligned(source, bytes, site);
    memset(destination, 0xff, size_t(bytes));
    current_->copies.push_back({destination, source, bytes, valid, current_->committed_groups});
  }

  void async_commit() { current_->committed_groups += 1; }

  void async_wait(int groups_in_flight) {
    std::vector<Copy>& copies = current_->copies;
    const int landing = current_->committed_groups - groups_in_flight;
    auto copy = copies.begin();
    for (; copy != copies.end() && copy->group < landing; ++copy) {
      if (copy->valid) {
        memcpy(copy->destination, copy->source, size_t(copy->bytes));
      } else {
        memset(copy->destination, 0, size_t(copy->bytes));
      }
    }
    copies.erase(copies.begin(), copy);
  }

  // Where one block waits for others: they only run while it does where the launch is cooperative.
  void wait_at_least(const unsigned* counter, unsigned value, Site site) {
    while (*counter < value) {
      current_->counter = counter;
      counter_waiters_.push_back(current_);
      wait(Wait::counter, "a counter", value, site);
    }
  }

  void* dynamic_smem() { return block_->dynamic_smem.data(); }
  int lane() const { return current_->lane; }

 private:
  static std::string hex(uint32_t mask) {
    char text[16];
    snprintf(text, sizeof text, "0x%08x", mask);
    return text;
  }

  std::string describe_kernel() const {
    const std::string name = kernel_name(launch_->kernel);
    return name.empty() ? "(without a symbol)" : name;
  }

  // ---- running blocks --------------------------------------------------------------------------

  void allocate(size_t blocks) {
    while (blocks_.size() < blocks) blocks_.push_back(std::make_unique<Block>());
    const size_t threads = blocks * size_t(thread_count_);
    while (threads_.size() < threads) threads_.push_back(std::make_unique<Thread>());
  }

  void start_block(Block& block, uint3 index) {
    block.index = index;
    block.first_thread = int(alive_ - 1) * thread_count_;
    block.live = thread_count_;
    block.ready_warps = 0;
    block.dynamic_smem.prepare(launch_->smem_bytes);
    static_smem_.poison();
    for (int i = 0; i < warp_count_; ++i) {
      Warp& warp = block.warps[i];
      warp.ready = 0;
      warp.exited = 0xffffffffu;
      warp.at_block_barrier = 0;
      for (Rendezvous& meeting : warp.pending) meeting.arrived = 0;
    }
    block.barrier = {};
    for (NamedBarrier& barrier : block.named_barriers) barrier = {};
    for (int i = 0; i < thread_count_; ++i) start_thread(block, i);
  }

  // Runs the blocks that have been started, to their end.
  void run_blocks() {
    fault_.clear();
    counter_waiters_.clear();
    while (Block* block = any_ready_block()) {
      block_ = block;
      blockIdx = block->index;
      run_warp(random_.bit_of(block->ready_warps));
    }
    for (size_t i = 0; i < alive_; ++i) {
      if (blocks_[i]->live != 0) report_stuck();
    }
    for (size_t i = 0; i < alive_; ++i) {
      if (!blocks_[i]->dynamic_smem.fences_hold()) {
        fault("a write outside the dynamic shared memory of " +
              std::to_string(launch_->smem_bytes) + " bytes");
      }
    }
    if (launch_->cooperative && !static_smem_.untouched()) {
      fault(
          "a cooperative kernel with __shared__ variables: here they are one for all blocks; "
          "use dynamic_smem()");
    }
  }

  // One of those that can go on, drawn at random; null if there is none.
  Block* any_ready_block() {
    const auto reached = [](Thread* thread) {
      if (*thread->counter < thread->wait_argument) return false;
      make_ready(*thread->block, thread->warp, 1u << thread->lane);
      return true;
    };
    counter_waiters_.erase(
        std::remove_if(counter_waiters_.begin(), counter_waiters_.end(), reached),
        counter_waiters_.end());
    const size_t first = alive_ > 1 ? random_.next() % alive_ : 0;
    for (size_t i = 0; i < alive_; ++i) {
      Block* const block = blocks_[(first + i) % alive_].get();
      if (block->ready_warps != 0) return block;
    }
    return nullptr;
  }

  void start_thread(Block& block, int rank) {
    Thread& thread = *threads_[size_t(block.first_thread + rank)];
    const unsigned i = unsigned(rank);
    thread.block = &block;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.warp = rank / warpSize;
    thread.lane = rank % warpSize;
    thread.wait = Wait::nothing;
    thread.copies.clear();
    thread.committed_groups = 0;
    thread.fiber.start(&Machine::thread_main);
    block.warps[thread.warp].exited &= ~(1u << thread.lane);
    make_ready(block, thread.warp, 1u << thread.lane);
  }

  // Runs the warp's lanes in random order until all of them wait, or until chance moves on to
  // another warp, so that warps interleave between barriers too.
  void run_warp(int index) {
    Warp& warp = block_->warps[index];
    do {
      const int lane = random_.bit_of(warp.ready);
      warp.ready &= ~(1u << lane);
      if (warp.ready == 0) block_->ready_warps &= ~(1u << index);
      run_thread(*threads_[size_t(block_->first_thread + index * warpSize + lane)]);
    } while (warp.ready != 0 && (random_.next() & 63u) != 0);
  }

  void run_thread(Thread& thread) {
    threadIdx = thread.index;
    thread.wait = Wait::nothing;
    current_ = &thread;
    thread.fiber.resume();
    current_ = nullptr;
    if (!fault_.empty()) throw Fault(fault_);
  }

  // The life of a fiber. A fault must not unwind beyond it: run_thread() carries it over.
  static void thread_main();

  void thread_exits() {
    Thread& self = *current_;
    Warp& warp = block_->warps[self.warp];
    const uint32_t bit = 1u << self.lane;
    for (const Rendezvous& meeting : warp.pending) {
      if (meeting.arrived != 0 && (meeting.mask & bit) != 0) {
        fault("divergence: the thread exits while lanes " + hex(meeting.arrived) +
              " of its warp wait for it at " + meeting.name + " at " + to_string(meeting.site));
      }
    }
    warp.exited |= bit;
    block_->live -= 1;
    self.wait = Wait::exited;
    open_block_barrier_if_complete();
  }

  void wait(Wait what, const char* name, uint32_t argument, Site site) {
    current_->wait = what;
    current_->wait_name = name;
    current_->wait_argument = argument;
    current_->wait_site = site;
    current_->fiber.suspend();
  }

  static void make_ready(Block& block, int warp, uint32_t lanes) {
    if (lanes == 0) return;
    block.warps[warp].ready |= lanes;
    block.ready_warps |= 1u << warp;
  }

  Rendezvous& find_rendezvous(Warp& warp, uint32_t mask) {
    Rendezvous* unused = nullptr;
    for (Rendezvous& meeting : warp.pending) {
      if (meeting.arrived != 0 && meeting.mask == mask) return meeting;
      if (meeting.arrived == 0 && unused == nullptr) unused = &meeting;
    }
    return *unused;  // There are as many as lanes, and each lane waits in at most one.
  }

  // True when this was the arrival, or the exit, that the barrier was waiting for.
  bool open_block_barrier_if_complete() {
    BlockBarrier& barrier = block_->barrier;
    if (barrier.waiting == 0 || barrier.waiting != block_->live) return false;
    barrier.result = {barrier.waiting, barrier.predicates};
    barrier.waiting = 0;
    for (int i = 0; i < warp_count_; ++i) {
      make_ready(*block_, i, std::exchange(block_->warps[i].at_block_barrier, 0));
    }
    // The thread that completes the barrier by arriving simply goes on.
    if (current_->wait != Wait::exited) {
      block_->warps[current_->warp].ready &= ~(1u << current_->lane);
    }
    return true;
  }

  [[noreturn]] void report_stuck() const {
    struct Group {
      int count = 0;
      std::string first;
    };
    std::map<std::string, Group> groups;
    for (size_t i = 0; i < alive_ * size_t(thread_count_); ++i) {
      const Thread& thread = *threads_[i];
      Group& group = groups[describe_wait(thread)];
      if (group.count++ != 0) continue;
      group.first = to_string(thread.index);
      if (alive_ > 1) group.first += " of block " + to_string(thread.block->index);
    }
    std::string report = "divergence or deadlock, no thread can go on";
    for (const auto& [what, group] : groups) {
      report +=
          "\n  " + std::to_string(group.count) + " threads, the first " + group.first + ", " + what;
    }
    fault(report);
  }

  std::string describe_wait(const Thread& thread) const {
    if (thread.wait == Wait::exited) return "have exited";
    std::string what = std::string("wait at ") + thread.wait_name;
    if (thread.wait == Wait::warp_op) what += " with mask " + hex(thread.wait_argument);
    if (thread.wait == Wait::named_barrier) {
      const NamedBarrier& barrier = thread.block->named_barriers[thread.wait_argument];
      what += " of barrier " + std::to_string(thread.wait_argument) + " (" +
              std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) +
              " arrived)";
    }
    if (thread.wait == Wait::counter) {
      what += " to be " + std::to_string(thread.wait_argument) + ", which is " +
              std::to_string(*thread.counter);
    }
    return what + " at " + to_string(thread.wait_site);
  }

  uint64_t seed_ = 1;
  Random random_{1};

  const Launch* launch_ = nullptr;
  int thread_count_ = 0;  // in a block
  int warp_count_ = 0;
  size_t alive_ = 0;                              // blocks that have been started
  Block* block_ = nullptr;                        // the one that runs, or ran last
  Thread* current_ = nullptr;                     // null while the scheduler itself runs
  std::string fault_;                             // of the thread that ran last, if it ended in one
  std::vector<std::unique_ptr<Thread>> threads_;  // kept from launch to launch, with their stacks
  std::vector<std::unique_ptr<Block>> blocks_;    // kept too
  std::vector<Thread*> counter_waiters_;
  StaticSharedMemory static_smem_;
};

// Never destroyed: launches may still come while the process ends.
Machine& machine() {
  static Machine* const instance = [] {
    auto* machine = new Machine;
    const char* seed = getenv("BIGKERN_SIMT_SEED");
    if (seed != nullptr) machine->set_seed(strtoull(seed, nullptr, 0));
    return machine;
  }();
  return *instance;
}

void Machine::thread_main() {
  Machine& self = machine();
  try {
    self.launch_->body(self.launch_->context);
    self.thread_exits();
  } catch (const Fault& fault) {
    self.fault_ = fault.what();
  }
  self.current_->fiber.suspend();
}

std::mutex launch_mutex;  // one machine: launches from several host threads take turns
std::string last_fault;

}  // namespace

void set_seed(uint64_t seed) { machine().set_seed(seed); }
const char* last_error() { return last_fault.c_str(); }

cudaError_t run_grid(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (launch.smem_bytes > kMaxDynamicSmem) return cudaErrorInvalidValue;
  if (launch.cooperative && uint64_t(grid.x) * grid.y * grid.z > kMultiprocessors) {
    return cudaErrorCooperativeLaunchTooLarge;
  }

  const std::lock_guard<std::mutex> lock(launch_mutex);
  try {
    machine().run_grid(launch);
  } catch (const Fault& fault) {
    last_fault = fault.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

void fault(const char* what, Site site) {
  machine().fault(std::string(what) + " at " + to_string(site));
}

void* dynamic_smem() { return machine().dynamic_smem(); }
int lane_id() { return machine().lane(); }

void warp_op(const char* name, uint32_t mask, void* operands, ExecuteWarp execute, Site site) {
  machine().warp_op(name, mask, operands, execute, site);
}

uint32_t vote(const char* name, uint32_t mask, bool predicate, Site site) {
  struct Lane {
    bool predicate;
    uint32_t ballot;
  };
  Lane self{predicate, 0};
  const auto count = [](void* const* lanes, uint32_t mask) {
    uint32_t ballot = 0;
    for (int i = 0; i < warpSize; ++i) {
      if ((mask >> i & 1) && static_cast<Lane*>(lanes[i])->predicate) ballot |= 1u << i;
    }
    for (int i = 0; i < warpSize; ++i) {
      if (mask >> i & 1) static_cast<Lane*>(lanes[i])->ballot = ballot;
    }
  };
  warp_op(name, mask, &self, count, site);
  return self.ballot;
}

BarrierResult block_barrier(const char* name, bool predicate, Site site) {
  return machine().block_barrier(name, predicate, site);
}

void named_barrier(int id, int threads, bool wait, Site site) {
  machine().named_barrier(id, threads, wait, site);
}

void wait_at_least(const unsigned* counter, unsigned value, Site site) {
  machine().wait_at_least(counter, value, site);
}

void async_copy(void* destination, const void* source, int bytes, bool valid, Site site) {
  machine().async_copy(destination, source, bytes, valid, site);
}
void async_commit() { machine().async_commit(); }
void async_wait(int groups_in_flight) { machine().async_wait(groups_in_flight); }

}  // namespace bigkern::simt

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorLaunchFailure:
      return bigkern::simt::last_error();
  }
  return "unrecognized error code";
}
