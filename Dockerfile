# The explorer on a CPU: docker build -t qwen-scope . && docker run -p 7860:7860 qwen-scope
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
ENTRYPOINT ["qwen-scope", "explore", "--host", "0.0.0.0", "--port", "7860"]
