"""Which tensors of Hugging Face models make which of ours, a row each.

``ours <- theirs + theirs``: theirs are stacked, row below row. ``{i}`` is a layer's number, ``*`` is weight
or bias, ``{half}`` is encoder or decoder.
"""

from __future__ import annotations

Row = tuple[str, tuple[str, ...]]


def _rows(text: str) -> tuple[Row, ...]:
    """``ours <- theirs + theirs`` a line."""
    pairs = (line.split("<-") for line in text.strip().splitlines())
    return tuple((ours.strip(), tuple(part.strip() for part in theirs.split("+"))) for ours, theirs in pairs)


TABLES: dict[str, tuple[Row, ...]] = {
    "bert": _rows("""
        token.weight             <- embeddings.word_embeddings.weight
        position.weight          <- embeddings.position_embeddings.weight
        segment.weight           <- embeddings.token_type_embeddings.weight
        embedding_norm.*         <- embeddings.LayerNorm.*
        blocks.{i}.qkv.*         <- encoder.layer.{i}.attention.self.query.* \
            + encoder.layer.{i}.attention.self.key.* + encoder.layer.{i}.attention.self.value.*
        blocks.{i}.proj.*        <- encoder.layer.{i}.attention.output.dense.*
        blocks.{i}.norm.*        <- encoder.layer.{i}.attention.output.LayerNorm.*
        blocks.{i}.ffn.linear1.* <- encoder.layer.{i}.intermediate.dense.*
        blocks.{i}.ffn.linear2.* <- encoder.layer.{i}.output.dense.*
        blocks.{i}.ffn.norm.*    <- encoder.layer.{i}.output.LayerNorm.*
        pooler.*                 <- pooler.dense.*
        masked.bias              <- cls.predictions.bias
        masked.dense.*           <- cls.predictions.transform.dense.*
        masked.norm.*            <- cls.predictions.transform.LayerNorm.*
        follows.*                <- cls.seq_relationship.*
        head.*                   <- classifier.*
    """),
    "gpt2": _rows("""
        token.weight             <- wte.weight
        position.weight          <- wpe.weight
        blocks.{i}.norm.*        <- h.{i}.ln_1.*
        blocks.{i}.qkv.*         <- h.{i}.attn.c_attn.*
        blocks.{i}.proj.*        <- h.{i}.attn.c_proj.*
        blocks.{i}.ffn.norm.*    <- h.{i}.ln_2.*
        blocks.{i}.ffn.linear1.* <- h.{i}.mlp.c_fc.*
        blocks.{i}.ffn.linear2.* <- h.{i}.mlp.c_proj.*
        norm.*                   <- ln_f.*
        head.weight              <- lm_head.weight
    """),
    "llama": _rows("""
        token.weight             <- embed_tokens.weight
        blocks.{i}.norm.*        <- layers.{i}.input_layernorm.*
        blocks.{i}.qkv.*         <- layers.{i}.self_attn.q_proj.* \
            + layers.{i}.self_attn.k_proj.* + layers.{i}.self_attn.v_proj.*
        blocks.{i}.proj.*        <- layers.{i}.self_attn.o_proj.*
        blocks.{i}.ffn.norm.*    <- layers.{i}.post_attention_layernorm.*
        blocks.{i}.ffn.linear1.* <- layers.{i}.mlp.gate_proj.* + layers.{i}.mlp.up_proj.*
        blocks.{i}.ffn.linear2.* <- layers.{i}.mlp.down_proj.*
        norm.*                   <- norm.*
        head.weight              <- lm_head.weight
    """),
    "vit": _rows("""
        patch.*                  <- embeddings.patch_embeddings.projection.*
        cls                      <- embeddings.cls_token
        position.weight          <- embeddings.position_embeddings
        blocks.{i}.norm.*        <- layers.{i}.layernorm_before.*
        blocks.{i}.qkv.*         <- layers.{i}.attention.q_proj.* \
            + layers.{i}.attention.k_proj.* + layers.{i}.attention.v_proj.*
        blocks.{i}.proj.*        <- layers.{i}.attention.o_proj.*
        blocks.{i}.ffn.norm.*    <- layers.{i}.layernorm_after.*
        blocks.{i}.ffn.linear1.* <- layers.{i}.mlp.fc1.*
        blocks.{i}.ffn.linear2.* <- layers.{i}.mlp.fc2.*
        norm.*                   <- layernorm.*
        head.*                   <- classifier.*
    """),
    "bart": _rows("""
        encoder.token.weight              <- shared.weight
        encoder.position.weight           <- encoder.embed_positions.weight
        encoder.embedding_norm.*          <- encoder.layernorm_embedding.*
        decoder.position.weight           <- decoder.embed_positions.weight
        decoder.embedding_norm.*          <- decoder.layernorm_embedding.*
        decoder.blocks.{i}.cross.norm.*   <- decoder.layers.{i}.encoder_attn_layer_norm.*
        decoder.blocks.{i}.cross.q.*      <- decoder.layers.{i}.encoder_attn.q_proj.*
        decoder.blocks.{i}.cross.kv.*     <- decoder.layers.{i}.encoder_attn.k_proj.* \
            + decoder.layers.{i}.encoder_attn.v_proj.*
        decoder.blocks.{i}.cross.proj.*   <- decoder.layers.{i}.encoder_attn.out_proj.*
        {half}.blocks.{i}.norm.*          <- {half}.layers.{i}.self_attn_layer_norm.*
        {half}.blocks.{i}.qkv.*           <- {half}.layers.{i}.self_attn.q_proj.* \
            + {half}.layers.{i}.self_attn.k_proj.* + {half}.layers.{i}.self_attn.v_proj.*
        {half}.blocks.{i}.proj.*          <- {half}.layers.{i}.self_attn.out_proj.*
        {half}.blocks.{i}.ffn.norm.*      <- {half}.layers.{i}.final_layer_norm.*
        {half}.blocks.{i}.ffn.linear1.*   <- {half}.layers.{i}.fc1.*
        {half}.blocks.{i}.ffn.linear2.*   <- {half}.layers.{i}.fc2.*
    """),
}
# What holds no weights of its own: masks, and the second name of a tied embedding.
IGNORED = {
    "bert": r"embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)",
    "gpt2": r"h\.\d+\.attn\.(bias|masked_bias)",
    "vit": "",
    "bart": r"(encoder|decoder)\.embed_tokens\.weight|lm_head\.weight|final_logits_bias",
    "llama": r".*rotary_emb\.inv_freq",
}
TIED = ("gpt2", "llama")  # may give the token embedding a second name, as the output's weights
PREFIXES = {"bert": "bert.", "gpt2": "transformer.", "llama": "model.", "vit": "vit.", "bart": "model."}
