"""A LangChain chain (pip install langchain-openai) against a running `octavo serve`; its questions run side by side."""

import os
import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
key = os.environ.get("OCTAVO_API_KEY", "none")
model = ChatOpenAI(base_url=address, api_key=key, model="menny", temperature=0, max_tokens=60)
chain = ChatPromptTemplate.from_messages([("user", "What is {a} plus {b}?")]) | model | StrOutputParser()
for answer in chain.batch([{"a": 7, "b": 5}, {"a": 20, "b": 22}]):
    print(answer)
