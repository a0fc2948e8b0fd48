// The parts of vec.inl in plain C++: SSE2 or NEON, whatever the compiler targets. A piece from the
// middle of vec.inl, once per instruction set that takes it. The compiler turns the vector
// operators into instructions; only aarch64's fused multiply-add and half conversions have to be
// named.

BIGKERN_VEC vf fma(vf a, vf b, vf c) {
#if defined(__aarch64__)
  return vf(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}

// a when the comparison holds, else b: a NaN in either gives b.
BIGKERN_VEC vf max(vf a, vf b) { return a > b ? a : b; }
BIGKERN_VEC vf min(vf a, vf b) { return a < b ? a : b; }
BIGKERN_VEC vf sqrt(vf x) {
#if defined(__aarch64__)
  return vf(vsqrtq_f32(float32x4_t(x)));
#elif BIGKERN_X86
  return vf(_mm_sqrt_ps(__m128(x)));
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

BIGKERN_VEC float reduce_add(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
BIGKERN_VEC float reduce_max(vf x) {
  const float a = x[0] > x[2] ? x[0] : x[2];
  const float b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}

BIGKERN_VEC vu widen_words(vh h) { return __builtin_convertvector(h, vu); }
BIGKERN_VEC vh narrow_words(vu x) { return __builtin_convertvector(x, vh); }

BIGKERN_VEC vf widen_fp16(vh h) {
#if defined(__aarch64__)
  return vf(vcvt_f32_f16(float16x4_t(h)));
#else
  vf x = {};
  for (int i = 0; i < W; ++i) x[i] = to_float(fp16{h[i]});
  return x;
#endif
}
BIGKERN_VEC vh narrow_fp16(vf x) {
#if defined(__aarch64__)
  return vh(vcvt_f16_f32(float32x4_t(x)));
#else
  vh h = {};
  for (int i = 0; i < W; ++i) h[i] = from_float<fp16>(x[i]).bits;
  return h;
#endif
}

BIGKERN_VEC vf load_floats_n(const float* p, int64_t n) {
  float lane[W] = {};
  for (int i = 0; i < n; ++i) lane[i] = p[i];
  return load_raw<vf>(lane);
}
BIGKERN_VEC void store_floats_n(float* p, vf x, int64_t n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
BIGKERN_VEC vh load_halves_n(const void* p, int64_t n) {
  uint16_t lane[W] = {};
  memcpy(lane, p, size_t(n) * 2);
  return load_raw<vh>(lane);
}
BIGKERN_VEC void store_halves_n(void* p, vh x, int64_t n) {
  uint16_t lane[W];
  store_raw(lane, x);
  memcpy(p, lane, size_t(n) * 2);
}

// W bytes as integers, and the low bytes of integers.
BIGKERN_VEC vi load_bytes_n(const uint8_t* p, int64_t n) {
  vi x = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
BIGKERN_VEC vi load_bytes(const uint8_t* p) { return load_bytes_n(p, W); }
BIGKERN_VEC void store_bytes_n(uint8_t* p, vi x, int64_t n) {
  for (int i = 0; i < n; ++i) p[i] = uint8_t(x[i]);
}
BIGKERN_VEC void store_bytes(uint8_t* p, vi x) { store_bytes_n(p, x, W); }

// n + 1 where a > b, elsewhere n.
BIGKERN_VEC vi count_above(vi n, vf a, vf b) { return n - (a > b); }

// table[index % 8]
BIGKERN_VEC vf lookup8(const float* table, vi index) {
  vf x = {};
  for (int i = 0; i < W; ++i) x[i] = table[index[i] & 7];
  return x;
}

// a0 b0 a1 b1, and a2 b2 a3 b3.
BIGKERN_VEC vf interleave_low(vf a, vf b) { return vf{a[0], b[0], a[1], b[1]}; }
BIGKERN_VEC vf interleave_high(vf a, vf b) { return vf{a[2], b[2], a[3], b[3]}; }
