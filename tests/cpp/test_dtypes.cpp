// The conversions of common/dtypes.h against rounding done in double precision.
#include <cmath>
#include <limits>
#include <random>

#include "check.h"
#include "common/dtypes.h"

using namespace bigkern;

namespace {

struct Format {
  int mantissa_bits;
  int min_exponent;  // of a normal number
  double largest;
};
constexpr Format kBf16{7, -126, 0x1.fep127};
constexpr Format kFp16{10, -14, 65504.0};

// The nearest number of the format: nearbyint rounds ties to even.
float nearest(float value, Format format) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), format.min_exponent);
  const double unit = std::ldexp(1.0, exponent - format.mantissa_bits);
  const double rounded = std::nearbyint(value / unit) * unit;
  const float infinity = std::numeric_limits<float>::infinity();
  return std::fabs(rounded) > format.largest ? std::copysign(infinity, value) : float(rounded);
}

template <class T>
void check_value(float value, Format format) {
  const float got = to_float(from_float<T>(value));
  CHECK_EQ(got, nearest(value, format));
  CHECK_EQ(std::signbit(got), std::signbit(value));
}

template <class T>
void check_format(Format format) {
  std::mt19937 random(1);
  for (int i = 0; i < 2000000; ++i) {
    const float value = detail::bits_float(uint32_t(random()));
    if (!std::isnan(value)) check_value<T>(value, format);
  }
  // Every stored value comes back, and every tie and its neighbours round as they should.
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const float value = to_float(T{uint16_t(bits)});
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (std::isnan(value)) {
      CHECK(std::isnan(to_float(from_float<T>(value))));
      continue;
    }
    CHECK_EQ(from_float<T>(value).bits, uint16_t(bits));
    const float next = to_float(T{uint16_t(bits + 1)});
    const float tie = std::isfinite(value) && std::isfinite(next) ? (value + next) / 2 : nan;
    if (!std::isfinite(tie)) continue;
    check_value<T>(tie, format);
    check_value<T>(std::nextafter(tie, INFINITY), format);
    check_value<T>(std::nextafter(tie, -INFINITY), format);
  }
  for (float value : {65519.9f, 65520.0f, 3.4e38f, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f}) {
    check_value<T>(value, format);
  }
  // NaNs whose payload sits only in the bits that are cut off must not become infinities.
  CHECK(std::isnan(to_float(from_float<T>(detail::bits_float(0x7f800001u)))));
  CHECK(std::isnan(to_float(from_float<T>(detail::bits_float(0xffffffffu)))));
}

}  // namespace

TEST(bf16_rounds_to_nearest_even) { check_format<bf16>(kBf16); }
TEST(fp16_rounds_to_nearest_even) { check_format<fp16>(kFp16); }
