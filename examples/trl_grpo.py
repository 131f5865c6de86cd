"""TRL's GRPOTrainer on a tiny Qwen2.5-VL that is shown dark and bright pictures, with our loss. CPU, under a minute.

The model has random weights, the script draws the pictures. A reply earns the share of its letters that lie in the first half of the
alphabet if the picture is dark, in the second half if it is bright: half of them by chance, all of them by looking.
"""

import tempfile
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig

from actial_fast.integrations.trl import FusedGRPOTrainer  # the one line: trl.GRPOTrainer otherwise
from actial_fast.model.tiny import TinyConfig, create

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Processor(Qwen2_5_VLProcessor):
    """transformers' own without its video part, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        super().__init__(image_processor, tokenizer, None, chat_template)


def reward(completions, bright, **_):
    """A share for each completion; text that holds no letter earns nothing."""
    letters = [[c for c in reply[0]["content"].lower() if "a" <= c <= "z"] for reply in completions]
    return [sum((c >= "n") == b for c in found) / max(len(found), 1) for found, b in zip(letters, bright, strict=True)]


def main() -> None:
    """Train, and print the mean reward along the way."""
    with tempfile.TemporaryDirectory() as folder:
        create(Path(folder), [], TinyConfig(hidden=64, layers=2, vision_hidden=32, heads=4, vision_depth=0, image_size=28), seed=0)
        processor = Processor(Qwen2VLImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), TEMPLATE)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
        shades = [16 * i for i in range(16)]
        rows = Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": "letters"}]] * len(shades),
                "image": [Image.new("RGB", (28, 28), (shade,) * 3) for shade in shades],
                "bright": [shade >= 128 for shade in shades],
            }
        )
        config = GRPOConfig(
            output_dir=f"{folder}/run",
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            num_generations=8,
            max_completion_length=6,
            max_steps=24,
            learning_rate=4e-3,
            lr_scheduler_type="constant",
            loss_type="dapo",
            logging_steps=4,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = FusedGRPOTrainer(model, reward, config, rows, processing_class=processor)
        trainer.train()
        for entry in trainer.state.log_history[:-1]:
            print(f"step {entry['step']:3d}  reward {entry['reward']:.3f}  entropy {entry['entropy']:.3f}")


if __name__ == "__main__":
    main()
