#include "common.h"
#include "llama.h"
#include <cstring>
static llama_model * model;
static llama_context * made;

// What `common_init_from_params` does with `--control-vector FILE`.
extern "C" int qs_open(const char * path, const char * vector, int length, int threads) {
    auto asked = llama_model_default_params();
    model = llama_model_load_from_file(path, asked);
    if (!model) return 0;
    auto params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = length;
    params.n_threads = params.n_threads_batch = threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    made = llama_init_from_model(model, params);
    if (!made) return 0;
    if (*vector) {
        const auto cvec = common_control_vector_load({{1.0f, vector}});
        if (cvec.n_embd == -1) return 0;
        if (llama_set_adapter_cvec(made, cvec.data.data(), cvec.data.size(), cvec.n_embd, 1, llama_model_n_layer(model))) return 0;
    }
    return llama_vocab_n_tokens(llama_model_get_vocab(model));
}
extern "C" int qs_logits(const int * ids, int n, int from, float * out) {
    if (from == 0) llama_memory_clear(llama_get_memory(made), true);
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; i++) {
        batch.token[i] = ids[i];
        batch.pos[i] = from + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = true;
    }
    int rc = llama_decode(made, batch);
    size_t v = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (int i = 0; !rc && i < n; i++) std::memcpy(out + i * v, llama_get_logits_ith(made, i), v * sizeof(float));
    llama_batch_free(batch);
    return rc;
}
