"""A client in ten lines, with the official package (pip install openai), against a running `octavo serve`."""

import os
import sys

from openai import OpenAI

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = OpenAI(base_url=address, api_key=os.environ.get("OCTAVO_API_KEY", "none"))
question = [{"role": "user", "content": "Who are you?"}]
for chunk in client.chat.completions.create(model="menny", messages=question, max_tokens=60, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
