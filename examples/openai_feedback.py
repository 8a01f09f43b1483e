"""OpenAI's own client for the answer, Noria's for what its reader thinks of it.

python examples/openai_feedback.py [URL]     NORIA_API_KEY: a key with the roles client and annotator
"""

import os
import sys

from openai import OpenAI

from noria.client import NoriaClient

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
key = os.environ.get("NORIA_API_KEY", "none")  # unread by a server without keys
openai = OpenAI(base_url=f"{url}/v1", api_key=key)
answer = openai.chat.completions.create(
    model="noria",
    messages=[{"role": "user", "content": "Which colour is the sky?"}],
    max_tokens=32,
    user="u-17",  # everything of this end user can be deleted later: client.forget_end_user("u-17")
    store=True,
    metadata={"app": "example"},
)
print(answer.choices[0].message.content)

# https with an authority of your own: NoriaClient(.., trust=Trust(ca=Path("ca.pem"))), and SSL_CERT_FILE for OpenAI's.
with NoriaClient(url, api_key=key) as client:
    client.record_feedback(answer.id, thumb="down", annotator="u-17")
    # An edit is also a preference: the better text over the one that was given.
    said = client.record_feedback(answer.id, edit="Blue, mostly.", annotator="u-17")
    print(f"kept as {said['preference_id']}, until a training reads it")
