"""Sentences of the program in the language of the page.

The library says everything in English, into reports and pictures too; only what the page shows is
translated, by templates: `{}` stands for a part that is kept, or translated in its turn where it is
a sentence of its own. What no template knows stays as it is.
"""

# ruff: noqa: RUF001 (Chinese has commas and brackets of its own)

from __future__ import annotations

import re
from collections.abc import Mapping

CHINESE: Mapping[str, str] = {
    # Why an adapter takes part (autolora.retrieval, cards)
    'title "{}" is in the prompt': "提示词里有标题“{}”",
    'trigger word "{}" is in the prompt': "提示词里有触发词“{}”",
    'tag "{}" is in the prompt': "提示词里有标签“{}”",
    'title is close to "{}" ({}): "{}"': "标题与“{}”意思相近（{}）：“{}”",
    'trigger is close to "{}" ({}): "{}"': "触发词与“{}”意思相近（{}）：“{}”",
    'tag is close to "{}" ({}): "{}"': "标签与“{}”意思相近（{}）：“{}”",
    'description is close to "{}" ({}): "{}"': "简介与“{}”意思相近（{}）：“{}”",
    'captions are close to "{}" ({}): "{}"': "图注与“{}”意思相近（{}）：“{}”",
    'its weights look like "{}" ({})': "它的权重像“{}”（{}）",
    "asked for": "提示词中指定",
    "pinned": "已固定",
    "part of the style": "风格的一部分",
    "attached": "已加载",
    # Notes of plans and reports
    "The index of the pool is being built ({} of {}).": "正在建立模型库索引（{} / {}）。",
    "The index of the pool is being built.": "正在建立模型库索引。",
    "Left out: {}": "未使用：{}",
    "{} more files were left out; `autolora pool check` lists them.": (
        "还有 {} 个文件未收录；“检查所有文件”会列出它们。"
    ),
    "The negative prompt has no effect: it needs guidance other than 1.": (
        "“不要出现”不起作用：引导强度须不等于 1。"
    ),
    "The prompt is longer than {} tokens; the rest of it is not read.": (
        "提示词超过 {} 个词元，其余部分不会被读取。"
    ),
    "There are no trained gates for this base model; the adapters are summed.": (
        "这个基础模型没有训练好的门控；适配器直接相加。"
    ),
    "The size {} was rounded up to {}.": "尺寸 {} 已上调为 {}。",
    "{} is not low-rank in {} layers, which are approximated (relative error {} on average, {} at "
    "most); the strategy merged is exact.": (
        "{} 有 {} 层不是低秩，已作近似（相对误差平均 {}，最大 {}）；融合方式 merged 是精确的。"
    ),
    "LoRA pool {} has no .safetensors file that can be used; put some in it, or name another "
    "folder.": "模型库是空的；请在模型库页面添加 LoRA 文件，或放入 {}。",
    "LoRA pool {} does not exist; make it and put .safetensors files in it, or name another "
    "folder.": "还没有模型库；请在模型库页面添加 LoRA 文件，或放入 {}。",
    # What is wrong with what was asked for
    "The prompt is empty; say what the picture shall show.": "提示词是空的；请写出想画的内容。",
    "The prompt has nothing but LoRA tags; add a few words to it.": (
        "提示词里只有 LoRA 标签；请再加几个词。"
    ),
    "The prompt has {} characters; at most {} are possible.": "提示词有 {} 个字符，最多 {} 个。",
    "The tag {} is not understood; write <lora:name:strength>.": (
        "无法理解标签 {}；请写成 <lora:名称:强度>。"
    ),
    "No LoRA named {} in pool {} ({} LoRAs); {}": ("模型库的 {2} 个 LoRA 中没有 {0}；{3}"),
    "did you mean {}?": "是不是 {}？",
    "`autolora pool list` shows the names.": "“从模型库添加”里有全部名称。",
    "The strength {} of LoRA {} is out of range; use {} to {}, commonly 0.5 to 1.": (
        "{1} 的强度 {0} 超出范围；请用 {2} 到 {3}，常用 0.5 到 1。"
    ),
    "The number of pictures must be between {} and {}, not {}.": (
        "张数须在 {} 到 {} 之间，不能是 {}。"
    ),
    "Steps must be between {} and {}, not {}.": "步数须在 {} 到 {} 之间，不能是 {}。",
    "The seed must be -1 for a random one, or between {} and {}.": (
        "种子须为 -1（随机），或在 {} 到 {} 之间。"
    ),
    "The seed must be a whole number, not {}.": "种子须为整数，不能是 {}。",
    "The number of pictures must be a whole number, not {}.": "张数须为整数，不能是 {}。",
    "The number of steps must be a whole number, not {}.": "步数须为整数，不能是 {}。",
    "The guidance must be a number.": "引导强度须为数字。",
    "Guidance must be a number between {} and {}, not {}.": (
        "引导强度须在 {} 到 {} 之间，不能是 {}。"
    ),
    "Size {} is not understood; write WIDTHxHEIGHT, such as 128x128.": (
        "无法理解尺寸 {}；请写成 宽x高，例如 128x128。"
    ),
    "Size {} is not possible: width and height must be between {} and {}.": (
        "尺寸 {} 不可用：宽和高须在 {} 到 {} 之间。"
    ),
    "At most {} adapters with a strength each can be chosen.": "最多可选 {} 个适配器。",
    "At most {} adapters can be left out.": "最多可排除 {} 个适配器。",
    "The selection of adapters is not understood; reload the page.": (
        "无法理解所选的适配器；请刷新页面。"
    ),
    "The queue is full ({} jobs); try again in a minute.": "队列已满（{} 个任务）；请稍后再试。",
    "{} jobs of yours are in the queue already; wait for one of them, or stop it.": (
        "队列里已有你的 {} 个任务；请等其中一个完成，或停止它。"
    ),
    "Something unexpected went wrong ({}); the server's log has the details.": (
        "发生了意外错误（{}）；详情见服务器日志。"
    ),
    # Styles, settings of earlier pictures
    "There is no adapter to save; pin one, or type what finds one.": (
        "没有可保存的适配器；请固定一个，或输入能找到适配器的提示词。"
    ),
    "There is no style {}; choose {}.": "没有风格 {}；可选 {}。",
    "There is a style {} already; take another name.": "风格 {} 已存在；请换个名称。",
    "{} cannot name a style; use letters, digits and dashes, at most 48.": (
        "{} 不能作风格名称；请用字母、数字和连字符，最多 48 个。"
    ),
    "This picture is not in the history of this visit any more.": (
        "这张图片已不在本次访问的历史中。"
    ),
    "These settings are not understood.": "无法理解这些设置。",
    "The settings in this picture are not understood.": "无法理解这张图片里的设置。",
    "{} holds no report; it was not made by AutoLoRA.": (
        "{} 里没有生成记录；它不是 AutoLoRA 生成的。"
    ),
    "{} cannot be read as a PNG picture: {}.": "无法把 {} 作为 PNG 图片读取：{}。",
    "The file": "该文件",
    # The pool's page
    "A file cannot be added under the name {}; send a plain file name without folders, such as "
    "my-style.safetensors.": (
        "不能以 {} 为文件名添加；请用不含文件夹的文件名，例如 my-style.safetensors。"
    ),
    "{} is not a .safetensors file; only those can be added, under names of at most {} "
    "characters.": "{} 不是 .safetensors 文件；只能添加这种文件，文件名最多 {} 个字符。",
    "{} is in the pool already, as {}.": "{} 已在模型库中，名为 {}。",
    "{} cannot be added as {}: that name is there already ({}); rename the file to add it.": (
        "不能把 {} 添加为 {}：已有同名文件（{}）；请改名后再添加。"
    ),
    "The request is too large; at most {} are taken.": "请求过大；最多接受 {}。",
}

ENGLISH: Mapping[str, str] = {
    # What speaks of the shell, or of folders of the server, in the words of the page
    "No LoRA named {} in pool {} ({} LoRAs); {}": "There is no {0} among the pool's {2} LoRAs; {3}",
    "`autolora pool list` shows the names.": "“Add from pool” shows all of them.",
    "LoRA pool {} has no .safetensors file that can be used; put some in it, or name another "
    "folder.": "The pool is empty; add LoRA files on its page, or put them into {}.",
    "LoRA pool {} does not exist; make it and put .safetensors files in it, or name another "
    "folder.": "There is no pool yet; add LoRA files on its page, or put them into {}.",
    "{} more files were left out; `autolora pool check` lists them.": (
        "{} more files were left out; “Check all files” on the pool's page lists them."
    ),
}

PHRASES: Mapping[str, Mapping[str, str]] = {"en": ENGLISH, "zh": CHINESE}


def compiled(templates: Mapping[str, str]) -> list[tuple[str, str]]:
    """Templates as pairs of a pattern and of what it becomes, for browsers.

    Args:
        templates: Sentences with `{}` for what is kept, and their translations with `{}` or `{0}`,
            `{1}` … for the same parts in another order.

    Returns:
        Regular expressions that Python and JavaScript read alike, with `{0}`, `{1}` … in the
        translation for their groups.
    """
    pairs = []
    for english, other in templates.items():
        pattern = "(.+?)".join(re.escape(piece) for piece in english.split("{}"))
        pieces = other.split("{}")
        numbered = pieces[0] + "".join(f"{{{n}}}{piece}" for n, piece in enumerate(pieces[1:]))
        pairs.append((f"^{pattern}$", numbered))
    return pairs
