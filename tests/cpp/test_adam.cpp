// The CPU Adam update on every instruction set and thread count, against the formula in double.

#include <cmath>
#include <random>
#include <vector>

#include "adam/adam.h"
#include "check.h"
#include "common/cpu/isa.h"
#include "threads.h"

namespace bigkern::adam {
namespace {

constexpr double kUntouched = 123.0;

// One parameter in storage of type T, with a guard element behind each array.
template <class T>
struct Storage {
  std::vector<T> p, g, m, v, vmax;
  float step;

  Storage(int64_t n, unsigned seed) : step(float(seed % 5)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (std::vector<T>* array : {&p, &g, &m, &v, &vmax}) {
      for (int64_t i = 0; i < n; ++i) {
        const float x = normal(random);
        array->push_back(from_float<T>(array == &v || array == &vmax ? x * x : x));
      }
      array->push_back(from_float<T>(float(kUntouched)));
    }
  }

  Parameter parameter(bool amsgrad, int64_t before) {
    void* maxima = amsgrad ? vmax.data() : nullptr;
    const int64_t n = int64_t(p.size()) - 1;
    return {p.data(), g.data(), m.data(), v.data(), maxima, &step, n, before};
  }
};

struct Numbers {
  double p, g, m, v, vmax;
};

// adam.h's formula in double.
Numbers exact(const Update& u, Numbers x, double t) {
  if (u.grad_scale != nullptr) x.g /= double(*u.grad_scale);
  double g = u.maximize ? -x.g : x.g;
  if (u.decoupled) {
    x.p *= 1 - u.lr * u.weight_decay;
  } else {
    g += u.weight_decay * x.p;
  }
  x.m += (1 - u.beta1) * (g - x.m);
  x.v = u.beta2 * x.v + (1 - u.beta2) * g * g;
  if (u.amsgrad) x.vmax = std::max(x.vmax, x.v);
  const double v = u.amsgrad ? x.vmax : x.v;
  const double bias1 = 1 - std::pow(u.beta1, t), bias2 = 1 - std::pow(u.beta2, t);
  x.p -= u.lr / bias1 * x.m / (std::sqrt(v / bias2) + u.eps);
  return x;
}

// Within a rounding to T, and a few of float's for sums of numbers around 1.
template <class T>
bool close(T have, double want) {
  const double rounding = sizeof(T) == 4 ? 1e-6 : std::is_same_v<T, bf16> ? 4.5e-3 : 6e-4;
  return std::abs(double(to_float(have)) - want) <= rounding * std::abs(want) + 1e-6;
}

template <class T>
void check_update(const Update& call, const Parallel& parallel) {
  std::vector<Storage<T>> storage;
  unsigned seed = 1;
  for (int64_t n : {1, 7, 0, 63, 129, 1023, 40000, 3}) storage.emplace_back(n, seed++);
  std::vector<Storage<T>> before = storage;
  std::vector<Parameter> parameters;
  int64_t elements = 0;
  for (Storage<T>& x : storage) {
    parameters.push_back(x.parameter(call.amsgrad, elements));
    elements += parameters.back().n;
  }
  cpu::update(call, parameters.data(), int64_t(parameters.size()), parallel);
  for (size_t k = 0; k < storage.size(); ++k) {
    const Storage<T>&now = storage[k], &old = before[k];
    CHECK_EQ(now.step, old.step + 1.0f);
    const size_t n = now.p.size() - 1;
    for (size_t i = 0; i < n; ++i) {
      const Numbers want = exact(call,
                                 {to_float(old.p[i]), to_float(old.g[i]), to_float(old.m[i]),
                                  to_float(old.v[i]), to_float(old.vmax[i])},
                                 now.step);
      CHECK(close(now.p[i], want.p));
      CHECK(close(now.g[i], want.g));
      CHECK(close(now.m[i], want.m));
      CHECK(close(now.v[i], want.v));
      CHECK(close(now.vmax[i], want.vmax));
    }
    for (const std::vector<T>* array : {&now.p, &now.g, &now.m, &now.v, &now.vmax}) {
      CHECK_EQ(to_float(array->back()), float(kUntouched));
    }
  }
}

template <class T>
void check_all(const Parallel& parallel) {
  const float scale = 4.0f;
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(static_cast<Isa>(level)));
    for (int flags = 0; flags < 16; ++flags) {
      const bool decoupled = flags & 1, amsgrad = flags & 2, maximize = flags & 4;
      const float* grad_scale = flags & 8 ? &scale : nullptr;
      check_update<T>({DtypeOf<T>::value, 1e-2, 0.9, 0.999, 1e-8, 0.1, decoupled, amsgrad, maximize,
                       grad_scale, nullptr, nullptr},
                      parallel);
    }
  }
}

TEST(f32) { check_all<float>(Parallel::serial()); }
TEST(bf16_) { check_all<bf16>(Parallel::serial()); }
TEST(f16) { check_all<fp16>(Parallel::serial()); }
TEST(f32_on_threads) { check_all<float>(std_threads<3>()); }

TEST(found_inf_changes_nothing) {
  Storage<float> x(100, 1);
  const Storage<float> before = x;
  const float found = 1.0f;
  const Parameter parameter = x.parameter(false, 0);
  cpu::update(
      {Dtype::f32, 1e-2, 0.9, 0.999, 1e-8, 0.1, true, false, false, nullptr, &found, nullptr},
      &parameter, 1, Parallel::serial());
  CHECK(x.p == before.p && x.m == before.m && x.v == before.v && x.step == before.step);
}

TEST(bias_corrections_keep_their_precision) {
  Update call = {Dtype::f32, 1.0,   0.9,   0.999,   1e-8,    0.0,
                 false,      false, false, nullptr, nullptr, nullptr};
  for (double beta2 : {0.0, 0.9, 0.999, 0.999999}) {
    call.beta2 = beta2;
    const Constants c = constants_of(call);
    for (float t : {1.0f, 2.0f, 10.0f, 1e3f, 1e6f}) {
      const Factors f = factors_of(c, c.lr, t);
      const double want = 1.0 / std::sqrt(1.0 - std::pow(beta2, double(t)));
      CHECK(std::abs(f.inv_sqrt_bias / want - 1.0) < 1e-6);
      CHECK(std::abs(f.step_size * (1.0 - std::pow(0.9, double(t))) - 1.0) < 1e-6);
    }
  }
}

}  // namespace
}  // namespace bigkern::adam
