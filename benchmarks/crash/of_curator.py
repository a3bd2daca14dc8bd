import tiktoken  # it counts tokens by a table from the internet, which is not there: words do for this


class Words:
    n_vocab = 100

    def encode(self, text, **options):
        return text.split()


tiktoken.get_encoding = tiktoken.encoding_for_model = lambda *names, **options: Words()

# -- what a user writes ---------------------------------------------------------------
import os  # noqa: E402

from bespokelabs import curator  # noqa: E402


class Say(curator.LLM):
    def prompt(self, row):
        return f"Say something about {row['topic']}."

    def parse(self, row, response):
        return {**row, "response": response}


rows = [{"topic": f"topic {i}"} for i in range(400)]
limits = {"max_concurrent_requests": 16, "max_requests_per_minute": 100_000, "max_tokens_per_minute": 100_000_000}
say = Say(model_name="m", backend="openai", backend_params={"base_url": os.environ["URL"], **limits})
say(rows, working_dir="work").dataset.to_json("rows.jsonl")
