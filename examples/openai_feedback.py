"""OpenAI's own client for the answer, Noria's for what its reader thinks of it.

python examples/openai_feedback.py [URL]
"""

import sys

from openai import OpenAI

from noria.client import NoriaClient

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
openai = OpenAI(base_url=f"{url}/v1", api_key="none")  # the server's key, where it asks for one
answer = openai.chat.completions.create(
    model="noria",
    messages=[{"role": "user", "content": "Which colour is the sky?"}],
    max_tokens=32,
    user="u-17",  # everything of this end user can be deleted later: client.forget_end_user("u-17")
    store=True,
    metadata={"app": "example"},
)
print(answer.choices[0].message.content)

# https with an authority of your own: NoriaClient(url, trust=Trust(ca=Path("ca.pem")))
with NoriaClient(url) as client:
    client.record_feedback(answer.id, thumb="down", annotator="u-17")
    # An edit is also a preference: the better text over the one that was given.
    said = client.record_feedback(answer.id, edit="Blue, mostly.", annotator="u-17")
    print(f"kept as {said['preference_id']}; {client.status()['preferences']['unused']} preferences wait for training")
