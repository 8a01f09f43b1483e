"""Starts a job, watches it to its end, and waits until its version answers; the awaited client.

python examples/retrain_watch.py [URL]     NORIA_API_KEY: a key with the role operator

A trainer has to run (`noria up` starts one); until then the job is queued.
"""

import asyncio
import os
import sys

from noria.client import AsyncNoriaClient
from noria.errors import NoriaError


async def main(url: str) -> None:
    """One turn of the wheel."""
    async with AsyncNoriaClient(url, api_key=os.environ.get("NORIA_API_KEY")) as client:
        before = (await client.status())["live"]
        job = await client.create_job(method="dpo", settings={"min_pairs": 1, "dpo": {"beta": 0.2}}, rollout="none")
        async for event in client.watch_job(job["id"]):
            print(event["kind"], event["data"])
        ended = await client.job(job["id"])
        if ended["state"] != "succeeded" or ended["version"] is None:
            sys.exit(f"{ended['id']} {ended['state']}: {ended['error']}")

        # The new version was judged by the gate; a rollout puts it live without dropping a request.
        rollout = await client.create_rollout(ended["version"])
        rollout = await client.wait_rollout(rollout["id"])
        print(f"{rollout['version']} {rollout['state']}; before: {before}. `noria rollback` takes it back.")


try:
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
except NoriaError as error:
    sys.exit(f"{error.code}: {error.message}")
