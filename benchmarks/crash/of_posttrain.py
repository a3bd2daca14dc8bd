from posttrain.synth import Generate, OpenAISynth, Pipeline

rows = [{"topic": f"topic {i}"} for i in range(400)]
client = OpenAISynth(mode="online", concurrency=16, work_dir="work")
step = Generate(template="Say something about {topic}.", model="m")
Pipeline([step]).run(rows, client, "say").export("rows.jsonl")
