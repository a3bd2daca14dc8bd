import os

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration

rows = [{"instruction": f"Say something about topic {i}."} for i in range(400)]
with Pipeline("say", cache_dir="work") as pipeline:
    load = LoadDataFromDicts(data=rows, batch_size=16)
    generate = TextGeneration(llm=OpenAILLM(model="m", base_url=os.environ["URL"]), input_batch_size=16)
    load >> generate
if __name__ == "__main__":
    pipeline.run(use_cache=True)["default"]["train"].to_json("rows.jsonl")
