# Fine-tuning on conversations, learning from the assistant's answers only.
# Lines that differ from the notebook's: those marked with a double hash.
#   imports: unsloth, unsloth.chat_templates and trl -> unsloth_jax; no DataCollatorForSeq2Seq
#   tensors: return_tensors="pt" -> "np", and no .to("cuda")
#   names: a local folder and a table in place of the hub's; fewer steps and tokens

from datasets import Dataset

from unsloth_jax import (  ##
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    get_chat_template,
    standardize_sharegpt,
    train_on_responses_only,
)

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="chat",  ##
    max_seq_length=128,  ##
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)

# %%
tokenizer = get_chat_template(tokenizer, chat_template="chatml")  ##


def formatting_prompts_func(examples):
    convos = examples["conversations"]
    texts = [
        tokenizer.apply_chat_template(convo, tokenize=False, add_generation_prompt=False)
        for convo in convos
    ]
    return {"text": texts}


dataset = Dataset.from_list(  ##
    [
        {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]}
        for ask, answer in [
            ("What is the capital of France?", "Paris."),
            ("Write a short answer", "The lazy dog."),
            ("one two three", "four five six"),
            ("print(i", ", i * i)"),
        ]
    ]
)
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched=True)

# %%
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        dataset_text_field="text",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,  ##
        warmup_steps=1,  ##
        max_steps=24,  ##
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
trainer = train_on_responses_only(
    trainer,
    instruction_part="<|im_start|>user\n",
    response_part="<|im_start|>assistant\n",
)

# %%
masked = [t if on else 0 for t, on in zip(*trainer.rows[0], strict=True)]  ##
learnt = tokenizer.decode([t for t in masked if t])

# %%
trainer_stats = trainer.train()

# %%
FastLanguageModel.for_inference(model)
messages = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(
    messages,
    tokenize=True,
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="np",  ##
)
outputs = model.generate(**inputs, max_new_tokens=16, use_cache=True)
answer = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])[0]
