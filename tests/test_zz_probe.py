import collections, time
import pytest, schemathesis
from hypothesis import settings, HealthCheck
from conftest import tiny_model
from octavo import LLM, Tokenizer
from serve_fixtures import running
from test_chat import FILES
from schemathesis.config import SchemathesisConfig


from octavo.serve.app import create_app
from octavo.serve.config import ServeConfig
from octavo.serve.worker import Worker
tok=Tokenizer.from_file(FILES["v3"])
LLM_=LLM(tiny_model(vocab_size=tok.n_vocab,max_seq_len=128),tok)
@pytest.fixture(scope="module")
def served():
    with running(LLM_, model_id="tiny", keys=("k",)) as s: yield s
config = SchemathesisConfig.from_dict({"seed": 1, "headers": {"Authorization":"Bearer k"}, "generation": {"mode": "positive", "deterministic": True, "max-examples": 20, "database": "none"}})
schema = schemathesis.openapi.from_dict(create_app(Worker(LLM_), ServeConfig(model_id="tiny", keys=("k",))).openapi(), config=config)
L=[{}]
N=collections.Counter(); F=collections.Counter(); T=collections.Counter(); EX={}
@schema.include(path_regex="completions$").parametrize()
@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_api(case, served):
    t=time.time()
    if isinstance(case.body, dict):
        if isinstance(case.body.get("n"), int) and 1<case.body["n"]<=128: case.body["n"]=2
    b=case.body
    if not isinstance(b, dict): return
    if "chat" in case.operation.label:
        texts=[m["content"] for m in b.get("messages",[]) if isinstance(m,dict) and isinstance(m.get("content"),str) and m["content"].strip()]
        b["messages"]=[{"role":"user","content":(texts or ["hi"])[0][:50]}]
        if b.get("top_logprobs") is not None: b["logprobs"]=True
        if b.get("response_format"): b.pop("tools",None); b.pop("tool_choice",None)
        if not b.get("tools"): b.pop("tool_choice",None)
    else:
        if b.get("best_of"): b["best_of"]=b.get("n") or 1
    if not b.get("stream"): b.pop("stream_options",None)
    for k in ("audio","functions","function_call","web_search_options","suffix"): b.pop(k,None)
    try:
        r=case.call(base_url=served.root); L.append(r.json() if r.status_code!=200 else {'error':{'message':'OK'}}); case.validate_response(r)
    except BaseException as e:
        for one in getattr(e,'exceptions',[e]):
            k=(case.operation.label,type(one).__name__, str(one)[:150]); 
            k=(case.operation.label, e_.get("error",{}).get("message","?")[:70] if (e_:=getattr(one,"__dict__",{}) and L[-1]) else "")
            F[k]+=1
            EX.setdefault(k,(case.meta.generation.mode if case.meta else None, repr(getattr(case,"body",None))[:400], str(one)[:900]))
        r=None
    N[case.operation.label, r and r.status_code]+=1; T[case.operation.label]+=time.time()-t
def test_report():
    print(); 
    for k,v in N.items(): print(k,v)
    print(T)
    for k,v in F.items(): print(v,k,EX[k],"\n")
