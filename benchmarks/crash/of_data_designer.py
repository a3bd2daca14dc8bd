import os

import data_designer.config as dd
import pandas as pd
from data_designer.config.run_config import ResumeMode
from data_designer.interface import DataDesigner

rows = pd.DataFrame([{"topic": f"topic {i}"} for i in range(400)])
here = dd.ModelProvider(name="here", endpoint=os.environ["URL"], api_key="sk-none")
sampling = dd.ChatCompletionInferenceParams(max_parallel_requests=16)
model = dd.ModelConfig(alias="m", model="m", provider="here", inference_parameters=sampling)
builder = dd.DataDesignerConfigBuilder(model_configs=[model])
builder.with_seed_dataset(dd.DataFrameSeedSource(df=rows))
builder.add_column(dd.LLMTextColumnConfig(name="response", prompt="Say something about {{ topic }}.", model_alias="m"))
designer = DataDesigner(artifact_path="work", model_providers=[here])
made = designer.create(builder, num_records=400, dataset_name="say", resume=ResumeMode.IF_POSSIBLE)
made.load_dataset().to_json("rows.jsonl", orient="records", lines=True)
