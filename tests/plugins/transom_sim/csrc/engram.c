/* engram.c: ngram_hash and hashed_embedding, whose arguments have the same names in both. */
#include "launch.h"

#define PIECE 1024 /* elements of a row in the vector buffer at a time */

typedef struct {
  const transom_tensor *tokens, *multipliers, *moduli, *offsets, *lookback, *blocked;
  int64_t pad, B, S, n, h;
} hashing;

/* The id of the token at position s, which may lie before the chunk; negative: none to be read. */
static int64_t token_at(const hashing *a, int64_t b, int64_t s) {
  if (s < 0) return a->lookback ? integer_at(a->lookback, b, a->n - 1 + s, 0) : -1;
  if (a->blocked && integer_at(a->blocked, b, s, 0)) return -1;
  return integer_at(a->tokens, b, s, 0);
}

/* Row numbers of all columns of a token; the walk to the left stops at the first that is none. */
static void hash_token(const hashing *a, int64_t b, int64_t s, int64_t *rows) {
  uint64_t mix = 0; /* products wrap */
  bool alive = true;
  for (int64_t g = 0; g < a->n; g++) {
    const int64_t token = token_at(a, b, s - g);
    alive = alive && token >= 0;
    mix ^= (uint64_t)(alive ? token : a->pad) * (uint64_t)integer_at(a->multipliers, g, 0, 0);
    for (int64_t j = 0; g > 0 && j < a->h; j++) {
      const int64_t column = (g - 1) * a->h + j, modulus = integer_at(a->moduli, g - 1, j, 0);
      const int64_t rest = modulus > 0 ? (int64_t)mix % modulus : 0;
      rows[column] = (rest < 0 ? rest + modulus : rest) +
                     (a->offsets ? integer_at(a->offsets, column, 0, 0) : 0);
    }
  }
  count_vector(a->n + (a->n - 1) * a->h, 8); /* 64-bit integers are slow on this unit */
}

static hashing sizes(hashing a) {
  a.B = a.tokens->shape[0], a.S = a.tokens->shape[1];
  a.n = a.multipliers->shape[0], a.h = a.moduli->shape[1];
  return a;
}

static bool columns_fit(hashing a, transom_status *status) {
  return fits(status, (a.n - 1) * a.h * (int64_t)sizeof(int64_t) + PIECE * (int64_t)sizeof(float),
              "%lld columns of row numbers", (long long)((a.n - 1) * a.h));
}

/* ngram_hash --------------------------------------------------------------------------------- */

static hashing hash_arguments(const transom_call *call) {
  return sizes((hashing){.tokens = tensor_at(call, TRANSOM_NGRAM_HASH_TOKENS),
                         .multipliers = tensor_at(call, TRANSOM_NGRAM_HASH_MULTIPLIERS),
                         .moduli = tensor_at(call, TRANSOM_NGRAM_HASH_MODULI),
                         .offsets = tensor_at(call, TRANSOM_NGRAM_HASH_OFFSETS),
                         .lookback = tensor_at(call, TRANSOM_NGRAM_HASH_LOOKBACK),
                         .blocked = tensor_at(call, TRANSOM_NGRAM_HASH_BLOCKED),
                         .pad = call->args[TRANSOM_NGRAM_HASH_PAD].i});
}

static int32_t ngram_hash_supports(const transom_call *call, transom_status *status) {
  return columns_fit(hash_arguments(call), status);
}

static void ngram_hash_kernel(const transom_call *call) {
  const hashing a = hash_arguments(call);
  const int64_t columns = (a.n - 1) * a.h;
  int64_t *rows = (int64_t *)vector_buffer(2 * columns);
  int32_t *out = host_address(call->outs[0]->data);
  for (int64_t b = 0; b < a.B; b++)
    for (int64_t s = 0; s < a.S; s++) {
      hash_token(&a, b, s, rows);
      for (int64_t c = 0; c < columns; c++) *out++ = (int32_t)rows[c];
    }
}

IMPLEMENTATION(ngram_hash, "ngram_hash", TRANSOM_NGRAM_HASH_HASH, ngram_hash_supports, NULL);

/* hashed_embedding --------------------------------------------------------------------------- */

static hashing lookup_arguments(const transom_call *call) {
  return sizes((hashing){.tokens = tensor_at(call, TRANSOM_HASHED_EMBEDDING_TOKENS),
                         .multipliers = tensor_at(call, TRANSOM_HASHED_EMBEDDING_MULTIPLIERS),
                         .moduli = tensor_at(call, TRANSOM_HASHED_EMBEDDING_MODULI),
                         .offsets = tensor_at(call, TRANSOM_HASHED_EMBEDDING_OFFSETS),
                         .lookback = tensor_at(call, TRANSOM_HASHED_EMBEDDING_LOOKBACK),
                         .blocked = tensor_at(call, TRANSOM_HASHED_EMBEDDING_BLOCKED),
                         .pad = call->args[TRANSOM_HASHED_EMBEDDING_PAD].i});
}

static int32_t hashed_embedding_supports(const transom_call *call, transom_status *status) {
  return takes(call, TRANSOM_HASHED_EMBEDDING_TABLE, "table", true, status) &&
         columns_fit(lookup_arguments(call), status);
}

static void hashed_embedding_kernel(const transom_call *call) {
  const hashing a = lookup_arguments(call);
  const transom_tensor *t = tensor_at(call, TRANSOM_HASHED_EMBEDDING_TABLE);
  const transom_value *shard = &call->args[TRANSOM_HASHED_EMBEDDING_SHARD];
  const int64_t columns = (a.n - 1) * a.h, V = t->shape[0], d = t->shape[1];
  const int64_t first = shard->count ? shard->ints[0] : 0;
  int64_t *rows = (int64_t *)vector_buffer(2 * columns);
  float *piece = vector_buffer(PIECE);
  const matrix y = {.data = host_address(call->outs[0]->data), .type = type_of(t), .row = d,
                    .column = 1};
  matrix table = matrix_at(t, 0, 0);
  int64_t out = 0;
  for (int64_t b = 0; b < a.B; b++)
    for (int64_t s = 0; s < a.S; s++) {
      hash_token(&a, b, s, rows);
      for (int64_t c = 0; c < columns; c++) {
        const int64_t local = rows[c] - first;
        rows[c] = local >= 0 && local < V ? local : -1; /* the mover reads zeros there */
      }
      table.rows = rows;
      for (int64_t c = 0; c < columns; c++, out++)
        for (int64_t j = 0; j < d; j += PIECE) {
          const int64_t n = d - j < PIECE ? d - j : PIECE;
          load_row(piece, at(table, 0, j), c, n);
          store_row(at(y, 0, j), out, piece, n);
        }
    }
}

IMPLEMENTATION(hashed_embedding, "hashed_embedding", TRANSOM_HASHED_EMBEDDING_HASH,
               hashed_embedding_supports, NULL);
