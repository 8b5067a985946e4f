# Fine-tuning on instructions written as plain text.
# Lines that differ from the notebook's: those marked with a double hash.
#   imports: unsloth and trl -> unsloth_jax
#   tensors: return_tensors="pt" -> "np", and no .to("cuda")
#   names: a local folder and a table in place of the hub's; fewer steps and tokens

from datasets import Dataset

from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer  ##

max_seq_length = 256  ##
dtype = None
load_in_4bit = True

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="chat",  ##
    max_seq_length=max_seq_length,
    dtype=dtype,
    load_in_4bit=load_in_4bit,
)

# %%
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)

# %%
alpaca_prompt = """### Instruction:
{}

### Input:
{}

### Response:
{}"""

EOS_TOKEN = tokenizer.eos_token


def formatting_prompts_func(examples):
    triples = zip(examples["instruction"], examples["input"], examples["output"], strict=True)
    return {"text": [alpaca_prompt.format(*triple) + EOS_TOKEN for triple in triples]}


dataset = Dataset.from_list(  ##
    [
        {"instruction": "Write the next number", "input": "one two three", "output": "four"},
        {"instruction": "Write the next number", "input": "five six seven", "output": "eight"},
        {"instruction": "What is the capital?", "input": "France", "output": "Paris"},
        {"instruction": "Write a short answer", "input": "isn't it?", "output": "It is."},
    ]
)
dataset = dataset.map(formatting_prompts_func, batched=True)

# %%
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    dataset_num_proc=2,
    packing=False,
    args=SFTConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,  ##
        warmup_steps=1,  ##
        max_steps=8,  ##
        learning_rate=2e-2,  ##
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.001,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs",
        report_to="none",
    ),
)

# %%
trainer_stats = trainer.train()
print(f"{trainer_stats.metrics['train_runtime']} seconds used for training.")

# %%
FastLanguageModel.for_inference(model)
inputs = tokenizer(
    [alpaca_prompt.format("Write the next number", "one two three", "")],
    return_tensors="np",  ##
)
outputs = model.generate(**inputs, max_new_tokens=16, use_cache=True)
text = tokenizer.batch_decode(outputs)
