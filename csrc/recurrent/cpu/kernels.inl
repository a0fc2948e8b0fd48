// A recurrent layer on the CPU: the weights packed once, then one team of threads for all steps.
//
// Compiled once per instruction set.

#include <new>
#include <type_traits>

#include "common/cpu/pages.h"

// clang-format off
#include "recurrent/cpu/plan.inl"
#include "recurrent/cpu/cell.inl"
#include "recurrent/cpu/layer.inl"
#include "recurrent/cpu/scan_backward.inl"
// clang-format on

namespace bigkern::recurrent::BIGKERN_ISA {
namespace {

// Calls f with a constant of the mode.
template <class F>
void with_mode(Mode mode, const F& f) {
  switch (mode) {
    case Mode::lstm:
      return f(std::integral_constant<Mode, Mode::lstm>{});
    case Mode::gru:
      return f(std::integral_constant<Mode, Mode::gru>{});
    case Mode::rnn_tanh:
      return f(std::integral_constant<Mode, Mode::rnn_tanh>{});
    default:
      return f(std::integral_constant<Mode, Mode::rnn_relu>{});
  }
}

// Weights that are read again at every step would be a page walk for every 4 KB of them.
constexpr size_t kLargePagesFrom = size_t(2) << 20;

// Runs task(member) on every thread of a team, or on one thread where teams do not pay. The
// barriers lie at the workspace's beginning.
template <class Task>
void run_team(const Sizes& of, void* workspace, size_t bytes, const Parallel& parallel,
              const Task& task) {
  Barrier* barriers = static_cast<Barrier*>(workspace);
  prefer_large_pages(workspace, bytes, kLargePagesFrom);
  for (int i = 0; i <= parallel.threads; ++i) new (barriers + i) Barrier;
  if (parallel.threads == 1 || team_policy().alone()) {
    return task(Member{0, 1, share(of, 1), barriers});
  }
  const Clock::time_point start = Clock::now();
  Team team(parallel.threads);
  const auto body = [&](int64_t begin, int64_t end) BIGKERN_FN {
    const int me = team.join(end - begin);
    if (me >= 0) task(Member{me, team.size(), share(of, team.size()), barriers});
  };
  parallel.for_range(0, parallel.threads, 1, body);
  Clock::duration slept = team.slept();
  for (int i = 0; i <= parallel.threads; ++i) slept += barriers[i].slept();
  team_policy().learn(team.size(), Clock::now() - start, slept);
}

inline void* after_barriers(void* workspace, int threads) {
  return static_cast<Barrier*>(workspace) + threads + 1;
}
template <class T>
size_t gates_bytes(const Sizes& of) {
  return size_t(of.N * of.D * of.G() * of.H) * sizeof(T);
}
template <class Space, class Call>
size_t workspace_of(const Call& p, int threads) {
  return Space(p, threads, nullptr).bytes + size_t(threads + 1) * sizeof(Barrier);
}

}  // namespace

size_t layer_workspace(const Layer& p, int threads) {
  return with_dtype(p.of.dtype, [&](auto t) BIGKERN_FN {
    return workspace_of<LayerSpace<decltype(t)>>(p, threads);
  });
}

size_t scan_backward_workspace(const ScanBackward& p, int threads) {
  return with_dtype(p.of.dtype, [&](auto t) BIGKERN_FN {
    return workspace_of<BackwardSpace<decltype(t)>>(p, threads);
  });
}

void layer(const Layer& p, const Parallel& parallel) {
  with_dtype(p.of.dtype, [&](auto t) BIGKERN_FN {
    if (p.gates) prefer_large_pages(p.gates, gates_bytes<decltype(t)>(p.of));
    const LayerSpace<decltype(t)> space(p, parallel.threads,
                                        after_barriers(p.workspace, parallel.threads));
    with_mode(p.of.mode, [&](auto mode) BIGKERN_FN {
      run_team(p.of, p.workspace, space.bytes, parallel, [&](const Member& member) BIGKERN_FN {
        layer_by<decltype(mode)::value, decltype(t)>(p, member, space);
      });
    });
  });
}

void scan_backward(const ScanBackward& p, const Parallel& parallel) {
  with_dtype(p.of.dtype, [&](auto t) BIGKERN_FN {
    prefer_large_pages(p.dgates, gates_bytes<decltype(t)>(p.of));
    const BackwardSpace<decltype(t)> space(p, parallel.threads,
                                           after_barriers(p.workspace, parallel.threads));
    with_mode(p.of.mode, [&](auto mode) BIGKERN_FN {
      run_team(p.of, p.workspace, space.bytes, parallel, [&](const Member& member) BIGKERN_FN {
        scan_backward_by<decltype(mode)::value, decltype(t)>(p, member, space);
      });
    });
  });
}

}  // namespace bigkern::recurrent::BIGKERN_ISA
