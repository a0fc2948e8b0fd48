// The CPU Adam update in every storage, on every instruction set and thread count, against the
// formula in double; and the norm of all gradients.

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "adam/adam.h"
#include "adam/dynamic8.h"
#include "adam/remainder.h"
#include "check.h"
#include "common/cpu/isa.h"
#include "threads.h"

namespace bigkern::adam {
namespace {

// ---- storage ------------------------------------------------------------------------------------

enum class Kind { f32, bf16, f16, bits16, codes };

constexpr unsigned char kUntouched = 0x55;

// Numbers of one kind, with guard bytes behind them.
struct Array {
  Kind kind;
  std::vector<unsigned char> bytes;

  Array(Kind kind_, int64_t n) : kind(kind_), bytes(size_t((n + 1) * width()), kUntouched) {}

  int64_t width() const { return kind == Kind::f32 ? 4 : kind == Kind::codes ? 1 : 2; }
  void* data() { return bytes.data(); }

  template <class T>
  T at(int64_t i) const {
    T x;
    memcpy(&x, bytes.data() + size_t(i) * sizeof(T), sizeof x);
    return x;
  }
  template <class T>
  void put(int64_t i, T x) {
    memcpy(bytes.data() + size_t(i) * sizeof(T), &x, sizeof x);
  }

  float get(int64_t i) const {
    if (kind == Kind::f32) return at<float>(i);
    return kind == Kind::bf16 ? to_float(at<bf16>(i)) : to_float(at<fp16>(i));
  }
  void set(int64_t i, float x) {
    if (kind == Kind::f32) put(i, x);
    if (kind == Kind::bf16) put(i, from_float<bf16>(x));
    if (kind == Kind::f16) put(i, from_float<fp16>(x));
  }
  bool guarded(int64_t n) const {
    return std::all_of(bytes.begin() + n * width(), bytes.end(),
                       [](unsigned char byte) { return byte == kUntouched; });
  }
};

Kind kind_of(Dtype dtype) {
  return dtype == Dtype::f32 ? Kind::f32 : dtype == Dtype::bf16 ? Kind::bf16 : Kind::f16;
}
Kind kind_of(Moments moments) {
  return moments == Moments::codes ? Kind::codes : kind_of(Dtype(int(moments)));
}

// One parameter and its states, filled at random.
struct Stored {
  int64_t n;
  Array p, g, m, v, vmax, master;
  std::vector<float> m_scale, v_scale;
  float step;

  Stored(const Update& u, int64_t n_, unsigned seed)
      : n(n_),
        p(kind_of(u.dtype), n),
        g(kind_of(u.dtype), n),
        m(kind_of(u.moments), n),
        v(kind_of(u.moments), n),
        vmax(kind_of(u.moments), n),
        master(u.master == Master::f32 ? Kind::f32 : Kind::bits16, n),
        m_scale(size_t((n + kBlock - 1) / kBlock), 0.5f),
        v_scale(m_scale.size(), 0.25f),
        step(float(seed % 5)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) {
      p.set(i, normal(random));
      g.set(i, normal(random));
      if (u.master == Master::f32) master.put(i, p.get(i) + 1e-4f * normal(random));
      if (u.master == Master::remainder) master.put(i, int16_t(random()));
      for (Array* x : {&m, &v, &vmax}) {
        const float number = normal(random);
        x->set(i, x == &m ? number : number * number);
        if (u.moments == Moments::codes) x->put(i, uint8_t(random()));
      }
    }
  }

  Parameter parameter(const Update& u, int64_t before) {
    void* maxima = u.amsgrad ? vmax.data() : nullptr;
    void* kept = u.master == Master::none ? nullptr : master.data();
    return {p.data(),       g.data(),       m.data(), v.data(), maxima, kept,
            m_scale.data(), v_scale.data(), &step,    n,        before};
  }

  double wide(const Update& u, int64_t i) const {
    if (u.master == Master::none) return p.get(i);
    if (u.master == Master::f32) return master.at<float>(i);
    return join({p.at<bf16>(i), master.at<int16_t>(i)});
  }
  double m_of(const Update& u, int64_t i) const {
    if (u.moments != Moments::codes) return m.get(i);
    return decode_signed(m.at<uint8_t>(i)) * m_scale[size_t(i / kBlock)];
  }
  double v_of(const Update& u, int64_t i) const {
    if (u.moments != Moments::codes) return v.get(i);
    return decode_unsigned(v.at<uint8_t>(i)) * v_scale[size_t(i / kBlock)];
  }
};

// ---- the formula --------------------------------------------------------------------------------

struct Numbers {
  double p, g, m, v, vmax;
};

// adam.h's formula in double.
Numbers exact(const Update& u, Numbers x, double t) {
  if (u.grad_scale != nullptr) x.g /= double(*u.grad_scale);
  double g = u.maximize ? -x.g : x.g;
  if (u.grad_norm != nullptr) {
    const double norm = double(*u.grad_norm) / (u.grad_scale != nullptr ? *u.grad_scale : 1.0f);
    g *= std::min(1.0, u.max_norm / (norm + 1e-6));
  }
  if (u.zero_grads) x.g = 0.0;
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

// Within a rounding to the storage (two, at random), and a few of float's for sums of numbers
// around 1.
bool close(double have, double want, Kind kind, bool random = false) {
  const double rounding = kind == Kind::bf16  ? (random ? 9e-3 : 4.5e-3)
                          : kind == Kind::f16 ? 6e-4
                                              : 2e-6;
  return std::abs(have - want) <= rounding * std::abs(want) + 2e-6;
}

// A code is right if no other is nearer to the share; ties may go either way.
bool nearest_code(float value, float nearest, double share) {
  return std::abs(value - share) <= std::abs(nearest - share) + 1e-6 * std::abs(share) + 1e-12;
}

void check_codes(const Stored& now, const std::vector<double>& m, const std::vector<double>& v) {
  for (int64_t begin = 0; begin < now.n; begin += kBlock) {
    const int64_t end = std::min(now.n, begin + kBlock);
    double m_most = 0.0, v_most = 0.0;
    for (int64_t i = begin; i < end; ++i) {
      m_most = std::max(m_most, std::abs(m[size_t(i)]));
      v_most = std::max(v_most, v[size_t(i)]);
    }
    const float m_scale = now.m_scale[size_t(begin / kBlock)],
                v_scale = now.v_scale[size_t(begin / kBlock)];
    CHECK(close(m_scale, m_most, Kind::f32) && close(v_scale, v_most, Kind::f32));
    for (int64_t i = begin; i < end; ++i) {
      const double m_share = m[size_t(i)] / m_most, v_share = v[size_t(i)] / v_most;
      const uint8_t m_code = now.m.at<uint8_t>(i), v_code = now.v.at<uint8_t>(i);
      CHECK(nearest_code(decode_signed(m_code), decode_signed(encode_signed(float(m_share))),
                         m_share));
      CHECK(nearest_code(decode_unsigned(v_code), decode_unsigned(encode_unsigned(float(v_share))),
                         v_share));
      CHECK(v_code > 0);
    }
  }
}

// p and what is beside it; `step` is how far it went, in fp32.
void check_place(const Update& u, const Stored& now, int64_t i, double want, double step) {
  const double slack = 2e-6 * std::abs(step);
  const auto near = [&](double have, Kind kind) {
    return close(have, want, kind, u.stochastic) || std::abs(have - want) <= slack;
  };
  if (u.master == Master::none) {
    CHECK(near(now.p.get(i), now.p.kind));
    return;
  }
  const float wide = float(now.wide(u, i));
  CHECK(near(wide, Kind::f32));
  if (u.master == Master::f32) {
    Array rounded(now.p.kind, 1);
    rounded.set(0, wide);
    CHECK_EQ(now.p.get(i), rounded.get(0));
  }
}

void check_parameter(const Update& u, const Stored& now, const Stored& old) {
  const bool codes = u.moments == Moments::codes;
  CHECK_EQ(now.step, old.step + 1.0f);
  std::vector<double> m, v;
  for (int64_t i = 0; i < now.n; ++i) {
    const double vmax = codes ? 0.0 : old.vmax.get(i);
    const Numbers before = {old.wide(u, i), old.g.get(i), old.m_of(u, i), old.v_of(u, i), vmax};
    const Numbers want = exact(u, before, now.step);
    m.push_back(want.m), v.push_back(want.v);
    check_place(u, now, i, want.p, want.p - before.p);
    CHECK(close(now.g.get(i), want.g, now.g.kind));
    if (codes) continue;
    CHECK(close(now.m.get(i), want.m, now.m.kind, u.stochastic));
    CHECK(close(now.v.get(i), want.v, now.v.kind, u.stochastic));
    CHECK(close(now.vmax.get(i), want.vmax, now.v.kind, u.stochastic));
  }
  if (codes) check_codes(now, m, v);
  for (const Array* x : {&now.p, &now.g, &now.m, &now.v, &now.vmax, &now.master}) {
    CHECK(x->guarded(now.n));
  }
}

void check_update(const Update& u, const Parallel& parallel) {
  std::vector<Stored> stored;
  unsigned seed = 1;
  const int64_t longest = parallel.threads > 1 ? 40000 : 2000;  // beyond the grain of a thread
  for (int64_t n :
       {int64_t(1), int64_t(7), int64_t(0), int64_t(63), int64_t(129), longest, int64_t(3)})
    stored.emplace_back(u, n, seed++);
  const std::vector<Stored> before = stored;
  std::vector<Parameter> parameters;
  int64_t elements = 0;
  for (Stored& x : stored) {
    parameters.push_back(x.parameter(u, elements));
    elements += x.n;
  }
  cpu::update(u, parameters.data(), int64_t(parameters.size()), parallel);
  for (size_t k = 0; k < stored.size(); ++k) check_parameter(u, stored[k], before[k]);
}

Update typical(Dtype dtype, Moments moments, Master master) {
  Update u = {};
  u.dtype = dtype, u.moments = moments, u.master = master;
  u.lr = 1e-2, u.beta1 = 0.9, u.beta2 = 0.999, u.eps = 1e-2, u.weight_decay = 0.1;
  u.decoupled = true;
  return u;
}

// Every level; every flag, in two halves: those of the step, and those of the gradients.
void check_storage(Dtype dtype, Moments moments, Master master, const Parallel& parallel) {
  const float scale = 4.0f, norm = 200.0f;
  const bool codes = moments == Moments::codes;
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(static_cast<Isa>(level)));
    for (int flags = 0; flags < 8; ++flags) {
      Update u = typical(dtype, moments, master);
      u.decoupled = flags & 1, u.amsgrad = (flags & 2) && !codes, u.stochastic = flags & 4;
      u.seed = 0x123456789abull;
      check_update(u, parallel);
      u.maximize = flags & 1, u.zero_grads = flags & 2;
      u.grad_scale = flags & 4 ? &scale : nullptr;
      u.grad_norm = &norm, u.max_norm = flags & 2 ? 20.0 : 1000.0;
      check_update(u, parallel);
    }
  }
}

void check_dtype(Dtype dtype, const Parallel& parallel) {
  for (Moments moments : {Moments::f32, Moments::bf16, Moments::f16, Moments::codes}) {
    if (moments == Moments::f16 && dtype != Dtype::f16) continue;
    for (Master master : {Master::none, Master::f32, Master::remainder}) {
      if (master != Master::none && dtype == Dtype::f32) continue;
      if (master == Master::remainder && dtype != Dtype::bf16) continue;
      check_storage(dtype, moments, master, parallel);
    }
  }
}

TEST(f32) { check_dtype(Dtype::f32, Parallel::serial()); }
TEST(bf16_) { check_dtype(Dtype::bf16, Parallel::serial()); }
TEST(f16) { check_dtype(Dtype::f16, Parallel::serial()); }
TEST(f32_on_threads) { check_dtype(Dtype::f32, std_threads<3>()); }
TEST(bf16_on_threads) { check_dtype(Dtype::bf16, std_threads<3>()); }

TEST(found_inf_changes_nothing) {
  const float found = 1.0f;
  Update u = typical(Dtype::bf16, Moments::codes, Master::remainder);
  u.found_inf = &found, u.zero_grads = true;
  Stored x(u, 300, 1);
  const Stored before = x;
  const Parameter parameter = x.parameter(u, 0);
  cpu::update(u, &parameter, 1, Parallel::serial());
  CHECK(x.p.bytes == before.p.bytes && x.g.bytes == before.g.bytes);
  CHECK(x.m.bytes == before.m.bytes && x.v.bytes == before.v.bytes);
  CHECK(x.master.bytes == before.master.bytes && x.step == before.step);
  CHECK(x.m_scale == before.m_scale && x.v_scale == before.v_scale);
}

TEST(bias_corrections_keep_their_precision) {
  Update u = typical(Dtype::f32, Moments::f32, Master::none);
  u.lr = 1.0;
  for (double beta2 : {0.0, 0.9, 0.999, 0.999999}) {
    u.beta2 = beta2;
    const Constants c = constants_of(u);
    for (float t : {1.0f, 2.0f, 10.0f, 1e3f, 1e6f}) {
      const Factors f = factors_of(c, c.lr, t);
      const double want = 1.0 / std::sqrt(1.0 - std::pow(beta2, double(t)));
      CHECK(std::abs(f.inv_sqrt_bias / want - 1.0) < 1e-6);
      CHECK(std::abs(f.step_size * (1.0 - std::pow(0.9, double(t))) - 1.0) < 1e-6);
    }
  }
}

// ---- rounding at random -------------------------------------------------------------------------

bf16 rounded_at_random(float x, uint32_t bits) {
  return bf16{uint16_t((detail::float_bits(x) + (bits >> 16)) >> 16)};
}

// With beta 0, m is g and v is g^2, without a rounding: what is stored shows the bits drawn, and m
// that there are none for it. The positions pass 2^32, between lanes.
TEST(random_bits_are_those_of_the_contract) {
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(static_cast<Isa>(level)));
    Update u = typical(Dtype::f32, Moments::bf16, Master::none);
    u.beta1 = u.beta2 = 0.0, u.decoupled = true, u.amsgrad = true;
    u.stochastic = true, u.seed = 0xfedcba987654321ull;
    Stored x(u, 1000, 3);
    for (int64_t i = 0; i < x.n; ++i) x.m.set(i, 0.0f), x.vmax.set(i, 0.0f);
    const int64_t before = (int64_t(1) << 32) - 317;
    const Parameter parameter = x.parameter(u, before);
    cpu::update(u, &parameter, 1, Parallel::serial());
    for (int64_t i = 0; i < x.n; ++i) {
      const float g = x.g.get(i);
      const int64_t position = before + i;
      const DropoutRow row = random_row(u.seed, kSquares, uint32_t(x.step), position);
      const uint32_t bits = row.bits(uint32_t(position));
      CHECK_EQ(x.m.at<bf16>(i).bits, from_float<bf16>(g).bits);
      CHECK_EQ(x.v.at<bf16>(i).bits, rounded_at_random(g * g, bits).bits);
      CHECK_EQ(x.vmax.at<bf16>(i).bits, x.v.at<bf16>(i).bits);
    }
  }
}

TEST(infinities_and_nans_stay_when_rounded_at_random) {
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(static_cast<Isa>(level)));
    Update u = typical(Dtype::f32, Moments::bf16, Master::none);
    u.beta1 = 0.0, u.stochastic = true;
    Stored x(u, 40, 1);
    x.g.set(5, std::numeric_limits<float>::infinity());
    x.g.set(6, std::numeric_limits<float>::quiet_NaN());
    const Parameter parameter = x.parameter(u, 0);
    cpu::update(u, &parameter, 1, Parallel::serial());
    CHECK(std::isinf(x.m.get(5)) || std::isnan(x.m.get(5)));
    CHECK(std::isinf(x.v.get(5)) && std::isnan(x.m.get(6)) && std::isnan(x.v.get(6)));
    CHECK(std::isfinite(x.m.get(4)) && std::isfinite(x.v.get(7)));
  }
}

// ---- 8-bit codes --------------------------------------------------------------------------------

// A step with beta 0 stores g as it is: shares of all magnitudes, ends, zeros, tiny and huge
// blocks.
TEST(codes_of_all_magnitudes) {
  std::mt19937 random(7);
  std::uniform_real_distribution<float> exponent(-9.0f, 0.0f);
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(static_cast<Isa>(level)));
    for (float unit : {1.0f, 1e-18f, 1e-30f, 1e18f}) {
      Update u = typical(Dtype::f32, Moments::codes, Master::none);
      u.beta1 = u.beta2 = 0.0;
      Stored x(u, kBlock, 1);
      std::vector<double> m, v;
      for (int64_t i = 0; i < x.n; ++i) {
        const float sign = random() % 2 ? 1.0f : -1.0f;
        const float g = i == 9 ? unit : sign * unit * std::pow(10.0f, exponent(random));
        x.g.set(i, g);
        x.m.put(i, uint8_t(127));
        m.push_back(g), v.push_back(double(g * g));
      }
      const Parameter parameter = x.parameter(u, 0);
      cpu::update(u, &parameter, 1, Parallel::serial());
      CHECK_EQ(x.m.at<uint8_t>(9), 255);
      CHECK_EQ(x.m_scale[0], unit);
      for (int64_t i = 0; i < x.n; ++i) {
        const double share = m[size_t(i)] / unit;
        const float nearest = decode_signed(encode_signed(float(share)));
        CHECK(nearest_code(decode_signed(x.m.at<uint8_t>(i)), nearest, share));
      }
      if (unit == 1.0f) check_codes(x, m, v);
    }
  }
}

TEST(a_block_of_zeros_stays_zero) {
  Update u = typical(Dtype::f32, Moments::codes, Master::none);
  Stored x(u, 300, 1);
  for (int64_t i = 0; i < x.n; ++i)
    x.g.set(i, 0.0f), x.m.put(i, uint8_t(127)), x.v.put(i, uint8_t(0));
  const Parameter parameter = x.parameter(u, 0);
  cpu::update(u, &parameter, 1, Parallel::serial());
  for (int64_t i = 0; i < x.n; ++i) {
    CHECK_EQ(x.m.at<uint8_t>(i), 127);
    CHECK_EQ(x.v.at<uint8_t>(i), 0);
  }
  CHECK_EQ(x.m_scale[0], 0.0f);
  CHECK_EQ(x.v_scale[1], 0.0f);
}

// A NaN or an infinity spoils its block, visibly, and no other.
TEST(a_nan_spoils_its_block) {
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(static_cast<Isa>(level)));
    Update u = typical(Dtype::f32, Moments::codes, Master::none);
    Stored x(u, 3 * kBlock, 1);
    x.g.set(5, std::numeric_limits<float>::quiet_NaN());
    x.g.set(kBlock + 5, std::numeric_limits<float>::infinity());
    const Parameter parameter = x.parameter(u, 0);
    cpu::update(u, &parameter, 1, Parallel::serial());
    CHECK(std::isnan(x.m_scale[0]) && std::isnan(x.v_scale[0]));
    CHECK(std::isinf(x.m_scale[1]) && std::isinf(x.v_scale[1]));
    CHECK(std::isfinite(x.m_scale[2]) && std::isfinite(x.v_scale[2]));
  }
}

// All codes, decoded by a step that changes them little and encoded again.
TEST(every_code_comes_back) {
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(static_cast<Isa>(level)));
    Update u = typical(Dtype::f32, Moments::codes, Master::none);
    u.beta1 = u.beta2 = 1.0 - 1e-9;
    Stored x(u, kBlock, 1);
    for (int64_t i = 0; i < kBlock; ++i)
      x.g.set(i, 0.0f), x.m.put(i, uint8_t(i)), x.v.put(i, uint8_t(i));
    const Parameter parameter = x.parameter(u, 0);
    cpu::update(u, &parameter, 1, Parallel::serial());
    for (int64_t i = 0; i < kBlock; ++i) {
      CHECK_EQ(int(x.m.at<uint8_t>(i)), int(i));
      CHECK_EQ(int(x.v.at<uint8_t>(i)), int(i));
    }
  }
}

TEST(halves_join_to_what_was_split) {
  std::mt19937 random(1);
  for (int i = 0; i < 100000; ++i) {
    const uint32_t bits = random();
    CHECK_EQ(detail::float_bits(join(split(detail::bits_float(bits)))), bits);
  }
}

// ---- the norm of all gradients ------------------------------------------------------------------

void check_norm(Dtype dtype) {
  const Update u = typical(dtype, Moments::f32, Master::none);
  std::vector<Stored> stored;
  std::vector<Parameter> parameters;
  unsigned seed = 1;
  for (int64_t n : {1, 7, 0, 63, 129, 1023, 300000, 3}) stored.emplace_back(u, n, seed++);
  int64_t elements = 0;
  double sum = 0.0;
  for (Stored& x : stored) {
    parameters.push_back(x.parameter(u, elements));
    elements += x.n;
    for (int64_t i = 0; i < x.n; ++i) sum += double(x.g.get(i)) * x.g.get(i);
  }
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(static_cast<Isa>(level)));
    const int64_t count = int64_t(parameters.size());
    const float norm = cpu::grad_norm(dtype, parameters.data(), count, Parallel::serial());
    CHECK(std::abs(norm / std::sqrt(sum) - 1.0) < 1e-6);
    CHECK_EQ(norm, cpu::grad_norm(dtype, parameters.data(), count, std_threads<3>()));
  }
}

TEST(norm_f32) { check_norm(Dtype::f32); }
TEST(norm_bf16) { check_norm(Dtype::bf16); }
TEST(norm_f16) { check_norm(Dtype::f16); }

TEST(norm_of_what_is_not_finite) {
  const Update u = typical(Dtype::f32, Moments::f32, Master::none);
  Stored x(u, 1000, 1);
  Parameter parameter = x.parameter(u, 0);
  x.g.set(777, std::numeric_limits<float>::infinity());
  CHECK(std::isinf(cpu::grad_norm(Dtype::f32, &parameter, 1, Parallel::serial())));
  x.g.set(3, std::numeric_limits<float>::quiet_NaN());
  CHECK(std::isnan(cpu::grad_norm(Dtype::f32, &parameter, 1, Parallel::serial())));
  parameter.n = 0;
  CHECK_EQ(cpu::grad_norm(Dtype::f32, &parameter, 1, Parallel::serial()), 0.0f);
}

}  // namespace
}  // namespace bigkern::adam
