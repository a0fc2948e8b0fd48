// The parts of vec.inl that AVX2, FMA and F16C say better than the compiler would. A piece from the
// middle of vec.inl, once per instruction set that takes it.

BIGKERN_VEC vf fma(vf a, vf b, vf c) {
  return vf(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
}

// a when the comparison holds, else b: a NaN in either gives b.
BIGKERN_VEC vf max(vf a, vf b) { return vf(_mm256_max_ps(__m256(a), __m256(b))); }
BIGKERN_VEC vf min(vf a, vf b) { return vf(_mm256_min_ps(__m256(a), __m256(b))); }
BIGKERN_VEC vf sqrt(vf x) { return vf(_mm256_sqrt_ps(__m256(x))); }

BIGKERN_VEC float reduce_add(vf x) {
  __m128 q = _mm256_castps256_ps128(__m256(x)) + _mm256_extractf128_ps(__m256(x), 1);
  q += _mm_movehl_ps(q, q);
  return q[0] + q[1];
}
BIGKERN_VEC float reduce_max(vf x) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(__m256(x)), _mm256_extractf128_ps(__m256(x), 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return q[0] > q[1] ? q[0] : q[1];
}

BIGKERN_VEC vu widen_words(vh h) { return vu(_mm256_cvtepu16_epi32(__m128i(h))); }
BIGKERN_VEC vh narrow_words(vu x) {
  const __m256i low = _mm256_and_si256(__m256i(x), _mm256_set1_epi32(0xffff));
  return vh(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}

BIGKERN_VEC vf widen_fp16(vh h) { return vf(_mm256_cvtph_ps(__m128i(h))); }
BIGKERN_VEC vh narrow_fp16(vf x) {
  return vh(_mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
}

BIGKERN_VEC __m256i first_lanes(int64_t n) { return __m256i(lanes() < set1_int(int32_t(n))); }
BIGKERN_VEC vf load_floats_n(const float* p, int64_t n) {
  return vf(_mm256_maskload_ps(p, first_lanes(n)));
}
BIGKERN_VEC void store_floats_n(float* p, vf x, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes(n), __m256(x));
}

// There is no masked 16-bit load: through a small array.
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
BIGKERN_VEC vi load_bytes(const uint8_t* p) {
  return vi(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
BIGKERN_VEC void store_bytes(uint8_t* p, vi x) {
  const __m256i low = _mm256_and_si256(__m256i(x), _mm256_set1_epi32(255));
  const __m128i halves =
      _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
BIGKERN_VEC vi load_bytes_n(const uint8_t* p, int64_t n) {
  uint8_t lane[W] = {};
  memcpy(lane, p, size_t(n));
  return load_bytes(lane);
}
BIGKERN_VEC void store_bytes_n(uint8_t* p, vi x, int64_t n) {
  uint8_t lane[W];
  store_bytes(lane, x);
  memcpy(p, lane, size_t(n));
}

// n + 1 where a > b, elsewhere n.
BIGKERN_VEC vi count_above(vi n, vf a, vf b) { return n - (a > b); }

// table[index % 8]
BIGKERN_VEC vf lookup8(const float* table, vi index) {
  return vf(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), __m256i(index)));
}

// a0 b0 a1 b1 ... of the first, and of the second half of the lanes.
BIGKERN_VEC vf interleave_low(vf a, vf b) {
  const __m256 low = _mm256_unpacklo_ps(__m256(a), __m256(b));
  return vf(_mm256_permute2f128_ps(low, _mm256_unpackhi_ps(__m256(a), __m256(b)), 0x20));
}
BIGKERN_VEC vf interleave_high(vf a, vf b) {
  const __m256 low = _mm256_unpacklo_ps(__m256(a), __m256(b));
  return vf(_mm256_permute2f128_ps(low, _mm256_unpackhi_ps(__m256(a), __m256(b)), 0x31));
}
