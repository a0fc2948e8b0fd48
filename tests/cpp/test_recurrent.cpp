// The recurrent CPU kernels against plain loops in double, on every instruction set there is, and
// the teams of threads that they work in (common/cpu/team.h). Outputs and workspaces start as NaN;
// a workspace ends where memory does.

#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "common/cpu/team.h"
#include "recurrent_reference.h"

namespace bigkern::recurrent {
namespace {

// ---- the kernels --------------------------------------------------------------------------------

// So many bytes, all NaN, aligned as a cache line. The page after them may not be touched.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : page_(size_t(sysconf(_SC_PAGESIZE))) {
    CHECK_EQ(bytes % 64, size_t(0));
    size_ = (bytes + page_ - 1) / page_ * page_;
    before_ = size_ - bytes;
    void* memory =
        mmap(nullptr, size_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    memory_ = static_cast<unsigned char*>(memory);
    CHECK_EQ(mprotect(memory_ + size_, page_, PROT_NONE), 0);
    memset(memory_, 0xff, size_);
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    CHECK(std::all_of(memory_, data(), [](unsigned char byte) { return byte == 0xff; }));
    munmap(memory_, size_ + page_);
  }
  unsigned char* data() const { return memory_ + before_; }

 private:
  size_t page_, size_, before_;
  unsigned char* memory_;
};

struct Output {
  const char* name;
  const Doubles* want;
  Tensor got;
};
using Outputs = std::vector<Output>;

Sizes sizes_of(const Problem& p) {
  const Case& c = p.c;
  return {c.dtype, c.mode, c.T, p.N, c.D, c.B, c.H, c.packed ? p.batch_sizes.data() : nullptr};
}

Outputs forward(const Problem& p, const Parallel& parallel) {
  const Case& c = p.c;
  const auto out = [&](const char* name, Dtype dtype, const Doubles& want, bool wanted = true) {
    return Output{name, &want, Tensor::poisoned(dtype, wanted ? int64_t(want.size()) : 0)};
  };
  Outputs all = {out("y", c.dtype, p.y), out("hn", c.dtype, p.hn), out("cn", c.dtype, p.cn),
                 out("gates", c.dtype, p.gates, c.saves),
                 out("reserve", Dtype::f32, p.reserve, c.saves)};
  Layer call = {};
  call.of = sizes_of(p), call.I = c.I, call.x = p.x.data();
  for (int d = 0; d < c.D; ++d) {
    call.w_ih[d] = p.w_ih[d].data(), call.w_hh[d] = p.w_hh[d].data();
    call.b_ih[d] = p.b_ih[d].data(), call.b_hh[d] = p.b_hh[d].data();
  }
  call.h0 = p.h0.data(), call.c0 = p.c0.data(), call.zoneout = p.zoneout.data();
  call.y = all[0].got.data(), call.hn = all[1].got.data(), call.cn = all[2].got.data();
  call.gates = all[3].got.data(), call.reserve = static_cast<float*>(all[4].got.data());
  const Workspace workspace(cpu::layer_workspace(call, parallel.threads));
  call.workspace = workspace.data();
  cpu::layer(call, parallel);
  return all;
}

Outputs backward(const Problem& p, const Parallel& parallel) {
  const auto out = [&](const char* name, const Doubles& want) {
    return Output{name, &want, Tensor::poisoned(p.c.dtype, int64_t(want.size()))};
  };
  Outputs all = {out("dgates", p.dgates), out("dhidden_n", p.dhidden_n), out("dh0", p.dh0),
                 out("dc0", p.dc0)};
  ScanBackward call = {sizes_of(p),
                       p.dy.data(),
                       p.dhn.data(),
                       p.dcn.data(),
                       p.stored_gates.data(),
                       p.h0.data(),
                       p.c0.data(),
                       {p.w_hh[0].data(), p.w_hh[1].data()},
                       p.zoneout.data(),
                       p.stored_y.data(),
                       static_cast<const float*>(p.stored_reserve.data()),
                       all[0].got.data(),
                       all[1].got.data(),
                       all[2].got.data(),
                       all[3].got.data(),
                       nullptr};
  const Workspace workspace(cpu::scan_backward_workspace(call, parallel.threads));
  call.workspace = workspace.data();
  cpu::scan_backward(call, parallel);
  return all;
}

template <class F>
void on_every_level(const F& f) {
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(Isa(level)));
    f();
  }
}

void check_case(const Case& c) {
  const Problem p(c);
  // Of one unit alone, dh0 is a sum of a few rounded gradients that cancel.
  const double tol = tolerance(c.dtype) * (c.H == 1 ? 4 : 1);
  on_every_level([&] {
    for (const Outputs& all : {forward(p, Parallel::serial()), backward(p, Parallel::serial())}) {
      for (const Output& o : all) {
        if (o.got.data()) check_close(o.name, o.got, *o.want, tol);
      }
    }
  });
}

void check_mode(Mode mode) {
  const struct {
    int64_t B, T, H, I;
  } sizes[] = {{1, 1, 1, 1},   {1, 4, 70, 1},  {3, 1, 33, 5},   {3, 4, 7, 40},
               {15, 4, 33, 1}, {15, 1, 70, 5}, {40, 4, 1, 5},   {40, 1, 7, 40},
               {40, 4, 70, 5}, {40, 9, 7, 5},  {230, 2, 7, 40}, {15, 4, 33, 40}};
  std::mt19937 random(unsigned(mode) + 1);
  const auto sometimes = [&] { return (random() & 1) != 0; };
  for (const auto& s : sizes) {
    for (const int64_t D : {1, 2}) {
      for (const Dtype dtype : kDtypes) {
        Case c = {mode, dtype, D, s.B, s.T, s.H, s.I};
        for (bool* option : {&c.packed, &c.zoneout, &c.biases, &c.saves, &c.dy, &c.dstate}) {
          *option = sometimes();
        }
        check_case(c);
      }
    }
  }
}

TEST(lstm) { check_mode(Mode::lstm); }
TEST(gru) { check_mode(Mode::gru); }
TEST(rnn_tanh) { check_mode(Mode::rnn_tanh); }
TEST(rnn_relu) { check_mode(Mode::rnn_relu); }

// H and I are longer than what a product takes of K at once, and H has more blocks than it makes.
TEST(products_in_parts) {
  for (const Mode mode : kModes) {
    check_case({mode, Dtype::f32, 1, 3, 2, 200, 300});
    check_case({mode, Dtype::bf16, 1, 3, 2, 200, 300});
  }
}

// ---- threads ------------------------------------------------------------------------------------

// Three threads, it says, but one body begins when the one before it has ended.
Parallel in_turn() {
  return {[](int64_t begin, int64_t end, int64_t, Parallel::Body body, void* ctx) {
            for (int64_t i = begin; i < end; ++i) body(i, i + 1, ctx);
          },
          3};
}
// And here there is only one.
Parallel all_in_one() { return {Parallel::serial().run, 3}; }

void check_same_bits(const Outputs& got, const Outputs& want) {
  for (size_t i = 0; i < want.size(); ++i) CHECK(got[i].got.bytes == want[i].got.bytes);
}

TEST(the_same_bits_whoever_works) {
  for (const Mode mode : kModes) {
    for (const Case& c : {Case{mode, Dtype::f32, 2, 3, 4, 100, 5},
                          Case{mode, Dtype::bf16, 2, 40, 4, 33, 40, true, true}}) {
      const Problem p(c);
      on_every_level([&] {
        const Outputs y = forward(p, Parallel::serial()), dx = backward(p, Parallel::serial());
        for (const Parallel& parallel :
             {std_threads<2>(), std_threads<3>(), std_threads<5>(), in_turn(), all_in_one()}) {
          check_same_bits(forward(p, parallel), y);
          check_same_bits(backward(p, parallel), dx);
        }
      });
    }
  }
}

TEST(two_callers_at_once) {
  const Problem p({Mode::lstm, Dtype::f32, 2, 15, 4, 70, 5});
  const Outputs y = forward(p, Parallel::serial()), dx = backward(p, Parallel::serial());
  const auto caller = [&] {
    for (int i = 0; i < 20; ++i) {
      check_same_bits(forward(p, std_threads<2>()), y);
      check_same_bits(backward(p, std_threads<2>()), dx);
    }
  };
  std::thread other(caller);
  caller();
  other.join();
}

// What join() tells the bodies, in rising order; and the team's size.
std::pair<std::vector<int>, int> members_of(const Parallel& parallel) {
  Team team(parallel.threads);
  std::atomic<int> bodies{0};
  std::vector<int> members(size_t(parallel.threads));
  parallel.for_range(0, parallel.threads, 1, [&](int64_t begin, int64_t end) {
    members[size_t(bodies++)] = team.join(end - begin);
  });
  members.resize(size_t(bodies.load()));
  std::sort(members.begin(), members.end());
  return {members, team.size()};
}

TEST(a_team_is_who_comes_in_time) {
  using Members = std::vector<int>;
  CHECK(members_of(Parallel::serial()) == std::make_pair(Members{0}, 1));
  CHECK(members_of(all_in_one()) == std::make_pair(Members{0}, 1));
  CHECK(members_of(in_turn()) == std::make_pair(Members{-1, -1, 0}, 1));
  for (int i = 0; i < 100; ++i) {  // a busy machine may be late with some
    const auto [members, size] = members_of(std_threads<4>());
    CHECK_EQ(members.size(), size_t(4));
    for (int k = 0; k < 4; ++k) CHECK_EQ(members[size_t(k)], std::max(-1, k - 4 + size));
  }
}

// As in the kernels: two buffers by turns, and one wait a round.
template <int THREADS>
void check_barrier(int rounds) {
  Barrier barrier;
  int round_of[2][THREADS] = {}, wrong[THREADS] = {};
  std_threads<THREADS>().for_workers([&](int me) {
    for (int round = 1; round <= rounds; ++round) {
      round_of[round % 2][me] = round;
      barrier.wait(THREADS);
      for (const int other : round_of[round % 2]) wrong[me] += other != round;
    }
  });
  for (const int count : wrong) CHECK_EQ(count, 0);
}

TEST(a_barrier_serves_again_and_again) {
  check_barrier<2>(4000);
  check_barrier<4>(1000);
}

// How long a thread has run, in seconds, and how often it has come back to a core.
struct Usage {
  double seconds;
  long returns;

  static Usage now() {
    rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    const timeval &user = usage.ru_utime, &system = usage.ru_stime;
    return {double(user.tv_sec + system.tv_sec) + 1e-6 * double(user.tv_usec + system.tv_usec),
            usage.ru_nvcsw + usage.ru_nivcsw};
  }
};

// On a quiet machine who spins runs all the time, on a busy one who yields comes back all the time.
TEST(who_waits_for_long_sleeps_until_it_is_woken) {
  Barrier barrier;
  Usage waited{};
  std_threads<2>().for_workers([&](int me) {
    if (me == 1) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    const Usage before = Usage::now();
    barrier.wait(2);
    const Usage after = Usage::now();
    if (me == 0) waited = {after.seconds - before.seconds, after.returns - before.returns};
  });
  CHECK(waited.seconds < 0.02);
  CHECK(waited.returns < 10);
}

TEST(cores_are_those_that_the_process_may_use) {
  cpu_set_t all, one;
  CPU_ZERO(&one);
  CHECK_EQ(sched_getaffinity(0, sizeof all, &all), 0);
  CPU_SET(sched_getcpu(), &one);
  CHECK_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  CHECK_EQ(cores(), 1);
  CHECK_EQ(sched_setaffinity(0, sizeof all, &all), 0);
  CHECK_EQ(cores(), CPU_COUNT(&all));
}

TEST(calls_are_done_alone_after_a_team_that_did_not_pay) {
  using std::chrono::milliseconds;
  TeamPolicy policy;
  CHECK(!policy.alone());
  policy.learn(2, milliseconds(10), milliseconds(9));  // 11 ms alone
  CHECK(!policy.alone());
  for (const int calls : {1, 3, 7, 15, 15}) {
    policy.learn(2, milliseconds(10), milliseconds(11));  // 9 ms alone
    for (int i = 0; i < calls; ++i) CHECK(policy.alone());
    CHECK(!policy.alone());
  }
  policy.learn(2, milliseconds(10), milliseconds(0));
  policy.learn(1, milliseconds(10), milliseconds(2));  // waited in vain for a second one
  CHECK(policy.alone());
  CHECK(!policy.alone());
}

}  // namespace
}  // namespace bigkern::recurrent
