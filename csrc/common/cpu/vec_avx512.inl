// The parts of vec.inl that AVX-512 says better than the compiler would. A piece from the middle of
// vec.inl, once per instruction set that takes it.

BIGKERN_VEC __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1u); }

BIGKERN_VEC vf fma(vf a, vf b, vf c) {
  return vf(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
}

// a when the comparison holds, else b: a NaN in either gives b.
BIGKERN_VEC vf max(vf a, vf b) { return a > b ? a : b; }
BIGKERN_VEC vf min(vf a, vf b) { return a < b ? a : b; }
BIGKERN_VEC vf sqrt(vf x) { return vf(_mm512_maskz_sqrt_ps(__mmask16(0xffff), __m512(x))); }

typedef float half_vf __attribute__((vector_size(32)));
BIGKERN_VEC float reduce_add(vf x) {
  half_vf h[2];
  memcpy(h, &x, sizeof h);
  const __m256 s = __m256(h[0] + h[1]);
  __m128 q = _mm256_castps256_ps128(s) + _mm256_extractf128_ps(s, 1);
  q += _mm_movehl_ps(q, q);
  return q[0] + q[1];
}
BIGKERN_VEC float reduce_max(vf x) {
  half_vf h[2];
  memcpy(h, &x, sizeof h);
  const __m256 s = _mm256_max_ps(__m256(h[0]), __m256(h[1]));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return q[0] > q[1] ? q[0] : q[1];
}

BIGKERN_VEC vu widen_words(vh h) {
  return vu(_mm512_maskz_cvtepu16_epi32(__mmask16(0xffff), __m256i(h)));
}
BIGKERN_VEC vh narrow_words(vu x) {
  return vh(_mm512_maskz_cvtepi32_epi16(__mmask16(0xffff), __m512i(x)));
}
BIGKERN_VEC bool any_subnormal(vf x) { return _mm512_fpclass_ps_mask(__m512(x), 0x20) != 0; }

BIGKERN_VEC vf widen_fp16(vh h) { return vf(_mm512_maskz_cvtph_ps(__mmask16(0xffff), __m256i(h))); }
BIGKERN_VEC vh narrow_fp16(vf x) {
  return vh(_mm512_maskz_cvtps_ph(__mmask16(0xffff), __m512(x), _MM_FROUND_TO_NEAREST_INT));
}

BIGKERN_VEC vf load_floats_n(const float* p, int64_t n) {
  return vf(_mm512_maskz_loadu_ps(first_lanes(n), p));
}
BIGKERN_VEC void store_floats_n(float* p, vf x, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), __m512(x));
}
BIGKERN_VEC vh load_halves_n(const void* p, int64_t n) {
  return vh(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
BIGKERN_VEC void store_halves_n(void* p, vh x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), __m256i(x));
}

// W bytes as integers, and the low bytes of integers.
BIGKERN_VEC vi load_bytes_n(const uint8_t* p, int64_t n) {
  return vi(_mm512_maskz_cvtepu8_epi32(__mmask16(0xffff), _mm_maskz_loadu_epi8(first_lanes(n), p)));
}
BIGKERN_VEC vi load_bytes(const uint8_t* p) { return load_bytes_n(p, W); }
BIGKERN_VEC void store_bytes_n(uint8_t* p, vi x, int64_t n) {
  _mm512_mask_cvtepi32_storeu_epi8(p, first_lanes(n), __m512i(x));
}
BIGKERN_VEC void store_bytes(uint8_t* p, vi x) {
  store_raw(p, _mm512_maskz_cvtepi32_epi8(__mmask16(0xffff), __m512i(x)));
}

// n + 1 where a > b, elsewhere n.
BIGKERN_VEC vi count_above(vi n, vf a, vf b) {
  const __mmask16 above = _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_GT_OQ);
  return vi(_mm512_mask_add_epi32(__m512i(n), above, __m512i(n), _mm512_set1_epi32(1)));
}

// table[index % 8]
BIGKERN_VEC vf lookup8(const float* table, vi index) {
  const __m512 twice = _mm512_maskz_broadcast_f32x8(__mmask16(0xffff), _mm256_loadu_ps(table));
  return vf(_mm512_maskz_permutexvar_ps(__mmask16(0xffff), __m512i(index), twice));
}

// a0 b0 a1 b1 ... of the first, and of the second half of the lanes.
BIGKERN_VEC vf interleave_low(vf a, vf b) {
  const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return vf(_mm512_permutex2var_ps(__m512(a), order, __m512(b)));
}
BIGKERN_VEC vf interleave_high(vf a, vf b) {
  const __m512i order =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return vf(_mm512_permutex2var_ps(__m512(a), order, __m512(b)));
}
