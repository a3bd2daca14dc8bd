"""Three greetings: `python hello.py` asks OpenAI; OPENAI_BASE_URL=http://127.0.0.1:8765/v1 asks server.py instead.

Run it twice: the second time, nothing is sent.
"""

from posttrain.synth import OpenAISynth

client = OpenAISynth(mode="online", work_dir="runs/hello")
for name in ["Clara", "Justin", "Terry"]:
    client.add_chat_to_batch_task(
        task_name="say_hello",
        model="gpt-4o",
        messages=[{"role": "user", "content": f"Generate greetings to {name}"}],
    )
print(client.plan("say_hello"))
responses = client.execute_batch_task("say_hello")
for row in client.extract_messages_from_responses(responses):
    print(row["custom_id"], row["choices"][0]["content"])
