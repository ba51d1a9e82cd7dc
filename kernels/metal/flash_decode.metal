// Attention of few queries over a long context: grid (splits of the context, H_kv * blocks of rows, B), one threadgroup
// of D / 2 threads each. The model calls it for every decoded token, because MLX has no fused attention for 512-wide
// heads; a threadgroup reads its keys and values once for all G query heads. The splits go to merge_partials.
//
// Template: T, W (type of weight), D, G, ROWS (8 or 16), KEYS (32), ONE_VECTOR.
// q [B, H, L, D] T; keys, values [B, H_kv, T, D] T, any strides; weight [D]; cosines, sines [positions, pairs] float;
// first int [B]; scale float; sizes = (H_kv, L, T, chunk, q_start, k_start, pairs).
// out [splits, B, H, L, D] float; lse [splits, B, H, L] float.

constexpr int SIMDGROUPS = D / 64;
threadgroup float parts[SIMDGROUPS * ROWS * (KEYS + 4)];
threadgroup float weights[ROWS * (KEYS + 4)];
threadgroup float shrink[ROWS];
threadgroup float inverse[ROWS];

const int kv_heads = sizes[0];
const int L = sizes[1];
const int chunk = sizes[3];
const int rows = G * L;
const int blocks = (rows + ROWS - 1) / ROWS;
const int split = int(threadgroup_position_in_grid.x);
const int kv_head = int(threadgroup_position_in_grid.y) / blocks;
const int batch = int(threadgroup_position_in_grid.z);
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;

Sight sight;
sight.q_start = sizes[4];
sight.k_start = sizes[5];
sight.first_visible = first[batch];
sight.first_row = int(threadgroup_position_in_grid.y) % blocks * ROWS;
// Whole tiles of padding are passed over.
sight.start = max(split * chunk, max(sight.first_visible - sight.k_start, 0) / KEYS * KEYS);
sight.stop = min(sizes[2], (split + 1) * chunk);

KeyHead<T> head;
head.keys = keys + batch * keys_strides[0] + kv_head * keys_strides[1];
head.values = values + batch * values_strides[0] + kv_head * values_strides[1];
head.key_step = keys_strides[2];
head.key_dim_step = keys_strides[3];
head.value_step = values_strides[2];
head.value_dim_step = values_strides[3];

KeyForm<W> form;
form.weight = weight;
form.cosines = cosines;
form.sines = sines;
form.pairs = sizes[6];

// In float: there is room for it, as there is not for the many rows of flash_prefill.
vec<float, 2> queries[ROWS];
load_queries<T, float, W, D, G, ROWS, ONE_VECTOR>(
    q + batch * q_strides[0] + kv_head * G * q_strides[1],
    q_strides[1],
    q_strides[2],
    q_strides[3],
    sight.first_row,
    rows,
    form,
    simdgroup,
    lane,
    queries);

float2 sums[ROWS];
FLASH_UNROLL
for (short i = 0; i < ROWS; i++) {
  sums[i] = float2(0.0f, 0.0f);
}
float peak = MASKED;
float total = 0.0f;
attend_tiles<T, float, W, D, G, ROWS, KEYS, ONE_VECTOR>(
    head, form, sight, scale, queries, parts, weights, shrink, simdgroup, lane, sums, peak, total);

const int64_t place = (int64_t(split) * int64_t(threadgroups_per_grid.z) + batch) * kv_heads + kv_head;
store_rows<float, D, G, ROWS>(
    sums, peak, total, sight.first_row, rows, L, inverse, simdgroup, lane, out + place * rows * D, lse + place * rows);
