# Answering with a stream of text, then saving in every way and loading again.
# Lines that differ from the notebook's: those marked with a double hash.
#   imports: unsloth -> unsloth_jax
#   tensors: return_tensors="pt" -> "np", and no .to("cuda")
#   names: a local folder in place of the hub's; fewer tokens; the training stands elsewhere

from transformers import TextStreamer

from unsloth_jax import FastLanguageModel  ##

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="chat",  ##
    max_seq_length=128,  ##
    dtype=None,
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=3407)

# %%
model = FastLanguageModel.for_inference(model)
messages = [{"role": "user", "content": "one two three"}]
inputs = tokenizer.apply_chat_template(
    messages,
    add_generation_prompt=True,
    return_tensors="np",  ##
)["input_ids"]
text_streamer = TextStreamer(tokenizer, skip_prompt=True)
_ = model.generate(
    input_ids=inputs,
    streamer=text_streamer,
    max_new_tokens=16,  ##
    use_cache=True,
    do_sample=True,
    temperature=1.5,
    min_p=0.1,
)

# %%
model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")

# %%
if True:
    again, tokenizer = FastLanguageModel.from_pretrained(
        model_name="lora_model",
        max_seq_length=128,  ##
        dtype=None,
        load_in_4bit=True,
    )
    FastLanguageModel.for_inference(again)

# %%
model.save_pretrained_merged("merged", tokenizer, save_method="merged_16bit")
model.save_pretrained_merged("adapters", tokenizer, save_method="lora")
if False:
    model.push_to_hub_merged("me/model", tokenizer, save_method="merged_16bit", token="")

# %%
model.save_pretrained_gguf("gguf", tokenizer)
model.save_pretrained_gguf("gguf_small", tokenizer, quantization_method="q4_k_m")
model.save_pretrained_gguf("gguf_full", tokenizer, quantization_method=["f16", "q5_k_m"])
