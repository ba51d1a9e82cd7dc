// Attention of a chunk of queries over all keys before and in it: grid (blocks of rows, H_kv, B), one threadgroup of
// D / 2 threads each. The model calls it for prompts and long verifications, because MLX has no fused attention for
// 512-wide heads and the plain one keeps all scores. A block is ROWS / G queries of all G heads that share keys.
//
// Template: T, O (type of out), W (type of weight), D, G, ROWS (16 or 32), KEYS (16), ONE_VECTOR.
// q [B, H, L, D] T; keys, values [B, H_kv, T, D] T, any strides; weight [D]; cosines, sines [positions, pairs] float;
// first int [B]; scale float; sizes = (H_kv, L, T, q_start, k_start, pairs).
// out [B, H, L, D] O; lse [B, H, L] float.

constexpr int SIMDGROUPS = D / 64;
threadgroup float parts[SIMDGROUPS * ROWS * (KEYS + 4)];
threadgroup float weights[ROWS * (KEYS + 4)];
threadgroup float shrink[ROWS];
threadgroup float inverse[ROWS];

const int L = sizes[1];
const int rows = G * L;
const int kv_head = int(threadgroup_position_in_grid.y);
const int batch = int(threadgroup_position_in_grid.z);
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;

Sight sight;
sight.q_start = sizes[3];
sight.k_start = sizes[4];
sight.first_visible = first[batch];
// The last queries see most keys: they begin first.
sight.first_row = int(threadgroups_per_grid.x - 1 - threadgroup_position_in_grid.x) * ROWS;
// Whole tiles of padding are passed over, and what is in the future of every row.
sight.start = max(sight.first_visible - sight.k_start, 0) / KEYS * KEYS;
sight.stop = min(sizes[2], sight.q_start + (sight.first_row + ROWS - 1) / G + 1 - sight.k_start);

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
form.pairs = sizes[5];

// In their own type, which is what the registers hold beside 64 numbers of output.
vec<T, 2> queries[ROWS];
load_queries<T, T, W, D, G, ROWS, ONE_VECTOR>(
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
attend_tiles<T, T, W, D, G, ROWS, KEYS, ONE_VECTOR>(
    head, form, sight, scale, queries, parts, weights, shrink, simdgroup, lane, sums, peak, total);

const int64_t place = int64_t(batch) * sizes[0] + kv_head;
store_rows<O, D, G, ROWS>(
    sums, peak, total, sight.first_row, rows, L, inverse, simdgroup, lane, out + place * rows * D, lse + place * rows);
