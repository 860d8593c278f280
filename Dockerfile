# The explorer on a CPU: docker build -t qwen-scope . && docker run -p 7860:7860 qwen-scope
# From another machine: docker run -p 7860:7860 qwen-scope --allow-host NAME, with the name or address in the browser.
# Other weights: docker run -p 7860:7860 -v ~/.cache/huggingface:/home/user/.cache/huggingface qwen-scope --model ... --sae ...
FROM python:3.11-slim

RUN useradd --create-home user
WORKDIR /home/user/qwen-scope
COPY --chown=user . .
RUN torch=$(grep '^torch==' constraints.txt) \
    && pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$torch" \
    && pip install --no-cache-dir -c constraints.txt '.[explorer]'
USER user
EXPOSE 7860
HEALTHCHECK --start-period=120s CMD python -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/', timeout=5)"
ENTRYPOINT ["qwen-scope", "explore", "--host", "0.0.0.0", "--port", "7860"]
