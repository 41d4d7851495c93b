// Bodies of RowKernels over a vector type V, which each merge_<isa>.cpp defines before it includes this file inside its anonymous namespace.
// No include guard and no includes on purpose: every instruction set gets its own copy.
//
// V has: Acc; kWidth lanes; kRows x kColumns vectors of sums that fit the registers; kMax; kInfinity; kShrink, by which even the largest number can
// be squared; zero(), load(const T*), store(T*, V), broadcast(Acc), fma(a, b, c) = a * b + c, divide(a, b), sum(v); Index, count_from(), below(),
// keep_greater() and store_index() for the running maximum; transpose(in, in_stride, out): kWidth rows x kWidth columns.

template <class V, class T>
V load_part(const T* p, int64_t n) {
  T part[V::kWidth] = {};
  for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return V::load(part);
}

template <class V, class T>
void store_part(T* p, V v, int64_t n) {
  T part[V::kWidth];
  V::store(part, v);
  for (int64_t i = 0; i < n; i++) p[i] = part[i];
}

template <class V, class T>
void weighted_sum(void* y_, const void* x_, int64_t stride, const int32_t* rows, const void* coeff_, int64_t count, int64_t C) {
  constexpr int kUnroll = 4, W = V::kWidth;
  const T* x = static_cast<const T*>(x_);
  const auto* coeff = static_cast<const typename V::Acc*>(coeff_);
  T* y = static_cast<T*>(y_);
  int64_t c = 0;
  for (; c + kUnroll * W <= C; c += kUnroll * W) {
    V sum[kUnroll];
    for (int u = 0; u < kUnroll; u++) sum[u] = V::zero();
    for (int64_t i = 0; i < count; i++) {
      const T* p = x + rows[i] * stride + c;
      const V w = V::broadcast(coeff ? coeff[i] : 1);
      for (int u = 0; u < kUnroll; u++) sum[u] = V::fma(V::load(p + u * W), w, sum[u]);
    }
    for (int u = 0; u < kUnroll; u++) V::store(y + c + u * W, sum[u]);
  }
  for (; c < C; c += W) {
    const int64_t n = C - c < W ? C - c : W;
    V sum = V::zero();
    for (int64_t i = 0; i < count; i++) sum = V::fma(load_part<V>(x + rows[i] * stride + c, n), V::broadcast(coeff ? coeff[i] : 1), sum);
    store_part(y + c, sum, n);
  }
}

template <class V, class T>
double dot_difference(const void* g_, const void* x_, const void* y_, int64_t C) {
  constexpr int W = V::kWidth;
  const T *g = static_cast<const T*>(g_), *x = static_cast<const T*>(x_), *y = static_cast<const T*>(y_);
  const V minus_one = V::broadcast(-1);
  V sum = V::zero();
  for (int64_t c = 0; c < C; c += W) {
    const int64_t n = C - c < W ? C - c : W;
    const bool whole = n == W;
    V d = whole ? V::load(x + c) : load_part<V>(x + c, n);
    if (y) d = V::fma(whole ? V::load(y + c) : load_part<V>(y + c, n), minus_one, d);
    sum = V::fma(whole ? V::load(g + c) : load_part<V>(g + c, n), d, sum);
  }
  return V::sum(sum);
}

// out[0..D) = x / max(|x|, 1e-12); false where x is not finite.
template <class V, class T>
bool normalize(const T* x, int64_t D, typename V::Acc* out) {
  using Acc = typename V::Acc;
  constexpr int W = V::kWidth;
  V partial[4] = {V::zero(), V::zero(), V::zero(), V::zero()};  // four chains, so that one multiply-add need not wait for the one before
  int64_t c = 0;
  for (; c + 4 * W <= D; c += 4 * W)
    for (int u = 0; u < 4; u++) {
      const V v = V::load(x + c + u * W);
      partial[u] = V::fma(v, v, partial[u]);
    }
  const V one = V::broadcast(1);
  V squares = V::fma(V::fma(partial[0], one, partial[1]), one, V::fma(partial[2], one, partial[3]));
  for (; c < D; c += W) {
    const V v = D - c >= W ? V::load(x + c) : load_part<V>(x + c, D - c);
    squares = V::fma(v, v, squares);
  }
  Acc square = V::sum(squares);
  if (!(square <= V::kMax)) {  // NaN, infinity, or squares that overflow: look at each, and go on with a smaller x
    for (int64_t d = 0; d < D; d += W) {
      const int64_t n = D - d < W ? D - d : W;
      Acc v[W];
      V::store(v, load_part<V>(x + d, n));
      for (int64_t i = 0; i < n; i++) {
        if (!(v[i] <= V::kMax && v[i] >= -V::kMax)) return false;
        out[d + i] = v[i] * V::kShrink;
      }
    }
    return normalize<V>(out, D, out);
  }
  Acc norm = sizeof(Acc) == 4 ? __builtin_sqrtf(square) : __builtin_sqrt(square);
  if (norm < Acc(1e-12)) norm = Acc(1e-12);
  const V divisor = V::broadcast(norm);
  for (int64_t d = 0; d < D; d += W) {
    const int64_t n = D - d < W ? D - d : W;
    const V unit =
        V::divide(n == W ? V::load(x + d) : load_part<V>(x + d, n), divisor);  // a product with 1 / norm would round x / |x| to less than 1
    if (n == W)
      V::store(out + d, unit);
    else
      store_part(out + d, unit, n);
  }
  return true;
}

// Scores of kRows sources against `Columns` vectors of destinations, and the running maximum over the columns. Every score is one chain of
// multiply-adds over d, whatever its place in the tiles: equal tokens get equal scores, and ties can be settled by index.
template <class V, int Columns>
void match_tile(const typename V::Acc* a, const typename V::Acc* b, int64_t D, int64_t first_column, int64_t num_columns, V* best,
                typename V::Index* partner) {
  constexpr int R = V::kRows, W = V::kWidth;
  V score[R][Columns];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 16
    for (int j = 0; j < Columns; j++) score[i][j] = V::zero();
#pragma GCC unroll 1
  for (int64_t d = 0; d < D; d++) {
    V column[Columns];
#pragma GCC unroll 16
    for (int j = 0; j < Columns; j++) column[j] = V::load(b + (j * D + d) * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      const V row = V::broadcast(a[i * D + d]);
#pragma GCC unroll 16
      for (int j = 0; j < Columns; j++) score[i][j] = V::fma(row, column[j], score[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < Columns; j++) {
    const auto index = V::count_from(first_column + j * W);
    const auto valid = V::below(index, num_columns);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) V::keep_greater(score[i][j], index, valid, best[i], partner[i]);
  }
}

// The columns from first_column on, `Columns` vectors at a time and the rest in narrower tiles.
template <class V, int Columns>
void match_tiles(const typename V::Acc* a, const typename V::Acc* columns, int64_t D, int64_t first_column, int64_t num_columns, V* best,
                 typename V::Index* partner) {
  int64_t j = first_column;
  for (; j + (Columns - 1) * V::kWidth < num_columns; j += Columns * V::kWidth)
    match_tile<V, Columns>(a, columns + j * D, D, j, num_columns, best, partner);
  if constexpr (Columns > 1)
    if (j < num_columns) match_tiles<V, Columns - 1>(a, columns, D, j, num_columns, best, partner);
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class V>
int64_t match_scratch(int64_t D, int64_t num_sources, int64_t num_destinations) {
  return sizeof(typename V::Acc) *
             (round_up(num_sources, V::kRows) * D + round_up(num_destinations, V::kWidth) * D + V::kWidth * round_up(D, V::kWidth)) +
         3 * 64;
}

template <class V, class T>
int64_t match(const void* x_, int64_t stride, int64_t D, const int32_t* sources, int64_t num_sources, const int32_t* destinations,
              int64_t num_destinations, void* best_, int32_t* partner, void* scratch) {
  using Acc = typename V::Acc;
  constexpr int R = V::kRows, W = V::kWidth;
  const T* x = static_cast<const T*>(x_);
  Acc* best = static_cast<Acc*>(best_);
  // rows [num_sources, D] row by row; columns [num_destinations / W][D][W], so that one load fetches W destinations
  const int64_t padded_rows = round_up(num_sources, R), padded_columns = round_up(num_destinations, W), padded_D = round_up(D, W);
  auto* columns = static_cast<Acc*>(scratch);
  auto* rows = columns + round_up(padded_columns * D, 16);
  auto* block = rows + round_up(padded_rows * D, 16);  // [W, padded_D]: destinations on their way into columns
  for (int64_t i = num_sources * D; i < padded_rows * D; i++) rows[i] = 0;
  for (int64_t i = 0; i < num_sources; i++)
    if (!normalize<V>(x + sources[i] * stride, D, rows + i * D)) return sources[i];
  for (int64_t j = 0; j < num_destinations; j += W) {
    for (int64_t l = 0; l < W; l++) {
      if (j + l < num_destinations) {
        if (!normalize<V>(x + destinations[j + l] * stride, D, block + l * padded_D)) return destinations[j + l];
      } else {
        for (int64_t d = 0; d < D; d++) block[l * padded_D + d] = 0;
      }
    }
    Acc* out = columns + j * D;
    int64_t d = 0;
    for (; d + W <= D; d += W) V::transpose(block + d, padded_D, out + d * W);
    for (; d < D; d++)
      for (int64_t l = 0; l < W; l++) out[d * W + l] = block[l * padded_D + d];
  }
  for (int64_t i = 0; i < num_sources; i += R) {
    V value[R];
    typename V::Index index[R];
    for (int k = 0; k < R; k++) {
      value[k] = V::broadcast(-V::kInfinity);
      index[k] = V::count_from(0);
    }
    match_tiles<V, V::kColumns>(rows + i * D, columns, D, 0, num_destinations, value, index);
    for (int k = 0; k < R && i + k < num_sources; k++) {
      Acc v[W];
      int32_t at[W];
      V::store(v, value[k]);
      V::store_index(at, index[k]);
      int32_t p = at[0];
      Acc highest = v[0];
      for (int l = 1; l < W; l++)
        if (v[l] > highest || (v[l] == highest && at[l] < p)) {
          highest = v[l];
          p = at[l];
        }
      best[i + k] = highest;
      partner[i + k] = p;
    }
  }
  return -1;
}

template <class V, class T>
constexpr p3b::RowKernels make_row_kernels() {
  return {&weighted_sum<V, T>, &dot_difference<V, T>, &match<V, T>, &match_scratch<V>};
}
