"""The page in English and Chinese: its own labels, and sentences of the library.

The library says everything in English, also in reports and pictures. Only what the page shows is
translated, by templates: `{}` stands for a part that is kept, or translated in turn where it is a
sentence of its own. What no template knows stays unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# ruff: noqa: RUF001 (Chinese has commas and brackets of its own)


LANGUAGES = {"en": "English", "zh": "中文"}

LABELS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "studio": "Studio",
        "pool": "Pool",
        "prompt": "Prompt",
        "prompt_hint": "What shall the picture show?  For example: a neon elephant",
        "negative": "Not in the picture",
        "negative_hint": "blurry, text",
        "generate": "Generate",
        "stop": "Stop",
        "compare": "Compare",
        "compare_info": "Also draw without adapters and with each one alone, same seed",
        "settings": "Settings",
        "redraw": "Redraw a picture",
        "redrawn": "How much of it is redrawn",
        "seed": "Seed",
        "seed_info": "-1: a new one each time",
        "count": "Pictures",
        "steps": "Steps",
        "size": "Size",
        "size_info": "Multiples of 16",
        "guidance": "Guidance",
        "strategy": "Fusion",
        "by_style": "as the style says",
        "style": "Style",
        "save_style": "Save as style",
        "take_settings": "Take over the pasted settings",
        "style_name": "Name of the style",
        "save": "Save",
        "cancel": "Cancel",
        "missing": "Not in the pool",
        "adapters": "Adapters",
        "automatic": "Automatic",
        "automatic_hint": "Add adapters that fit the prompt",
        "add_triggers": "Trigger words",
        "add_triggers_hint": "Add the trigger words of the adapters to the prompt",
        "add": "Add from pool",
        "no_prompt": "Type a prompt, and the adapters that fit it appear here.",
        "draws_alone": "Until then the base model draws alone.",
        "nothing_fits": "Nothing in the pool fits; the base model draws alone.",
        "pin": "Pin: take it in any case",
        "unpin": "Unpin",
        "drop": "Leave it out",
        "left_out": "Left out:",
        "bring_back": "Bring {name} back",
        "triggers_are": "Trigger words: {words}",
        "strength": "Strength",
        "strength_of": "Strength of {name}",
        "triggers": "Trigger words",
        "from_prompt": "in the prompt",
        "from_style": "style",
        "from_pinned": "pinned",
        "score": "Score",
        "channel_words": "words",
        "channel_texts": "meaning",
        "channel_weights": "weights",
        "empty_stage": "Your picture appears here",
        "empty_stage_hint": "Drop a PNG made here anywhere on the page to get its settings back.",
        "starters": "Or start from one of these",
        "use_word": "Put {name} into the prompt",
        "waiting": "Waiting: {n} before you",
        "next": "Next in the queue",
        "loading": "Loading the model",
        "indexing": "Reading the pool",
        "picture_of": "Picture {n} of {m}",
        "show_picture": "Show picture with seed {seed}",
        "step_of": "step {n} of {m}",
        "stopped": "Stopped.",
        "reuse_seed": "Use this seed",
        "download": "Download PNG",
        "full_size": "Open in full size",
        "gates": "How much each adapter spoke",
        "gates_hint": "Gate by layer (downwards) and step (to the right): dark is quiet, bright is "
        "loud, 1 is the plain sum.",
        "gate_mean": "mean {value}",
        "gates_none": "No gates took part in this picture.",
        "step": "step",
        "fused": "fused",
        "only": "only",
        "no_adapters": "no adapters",
        "history": "This visit",
        "history_hint": "Click a picture to get its settings back",
        "restored": "Settings are back; press Generate to draw it again.",
        "search_pool": "Search by name, trigger word or tag",
        "all_tags": "All tags",
        "all_formats": "All formats",
        "nothing_found": "Nothing in the pool matches.",
        "shown_of": "{n} of {m}",
        "close": "Close",
        "upload": "Add LoRA files",
        "upload_hint": "Drop .safetensors files here, or click to choose",
        "uploaded": "{name} was added; the index is being brought up to date.",
        "reindex": "Bring index up to date",
        "rebuild": "Rebuild",
        "check": "Check all files",
        "checking": "Checking {n} of {m}",
        "indexed": "{n} LoRAs in the index.",
        "index_left_out": "Left out:",
        "file": "File",
        "format": "Format",
        "layers": "Layers",
        "rank": "Rank",
        "dropped_keys": "Unused keys",
        "problem": "Problem",
        "fine": "All {n} files can be used.",
        "not_fine": "{m} of {n} files have a problem.",
        "use": "Use in a picture",
        "base_model": "Base model",
        "file_size": "Size",
        "saved_style": "Saved as style {name}.",
        "theme": "Light or dark",
        "language": "Language",
        "queue_now": "{n} in the queue",
        "model": "Model",
        "reads": "The model reads",
        "seconds": "{n} s",
        "lost": "The server does not answer; is it still running?",
    },
    "zh": {
        "studio": "创作",
        "pool": "模型库",
        "prompt": "提示词",
        "prompt_hint": "想画什么？例如：a neon elephant",
        "negative": "不要出现",
        "negative_hint": "blurry, text",
        "generate": "生成",
        "stop": "停止",
        "compare": "对比",
        "compare_info": "用同一种子，再画出不加适配器和逐个单独使用的结果",
        "settings": "设置",
        "redraw": "重绘一张图片",
        "redrawn": "重绘幅度",
        "seed": "种子",
        "seed_info": "-1 表示每次随机",
        "count": "张数",
        "steps": "步数",
        "size": "尺寸",
        "size_info": "16 的倍数",
        "guidance": "引导强度",
        "strategy": "融合方式",
        "by_style": "跟随风格",
        "style": "风格",
        "save_style": "存为风格",
        "take_settings": "采用粘贴的设置",
        "style_name": "风格名称",
        "save": "保存",
        "cancel": "取消",
        "missing": "模型库中没有",
        "adapters": "适配器",
        "automatic": "自动",
        "automatic_hint": "自动加入符合提示词的适配器",
        "add_triggers": "触发词",
        "add_triggers_hint": "把适配器的触发词加入提示词",
        "add": "从模型库添加",
        "no_prompt": "输入提示词后，这里会显示合适的适配器。",
        "draws_alone": "在此之前仅由基础模型绘制。",
        "nothing_fits": "模型库中没有合适的；仅由基础模型绘制。",
        "pin": "固定：始终使用",
        "unpin": "取消固定",
        "drop": "不使用",
        "left_out": "已排除：",
        "bring_back": "恢复 {name}",
        "triggers_are": "触发词：{words}",
        "strength": "强度",
        "strength_of": "{name} 的强度",
        "triggers": "触发词",
        "from_prompt": "来自提示词",
        "from_style": "风格",
        "from_pinned": "已固定",
        "score": "得分",
        "channel_words": "词语",
        "channel_texts": "语义",
        "channel_weights": "权重",
        "empty_stage": "图片会显示在这里",
        "empty_stage_hint": "把在这里生成的 PNG 拖到页面上，即可恢复它的设置。",
        "starters": "或从这些开始",
        "use_word": "把 {name} 加入提示词",
        "waiting": "排队中：前面还有 {n} 个",
        "next": "下一个就是你",
        "loading": "正在加载模型",
        "indexing": "正在读取模型库",
        "picture_of": "第 {n} 张，共 {m} 张",
        "show_picture": "显示种子为 {seed} 的图片",
        "step_of": "第 {n} 步，共 {m} 步",
        "stopped": "已停止。",
        "reuse_seed": "使用此种子",
        "download": "下载 PNG",
        "full_size": "打开原图",
        "gates": "各适配器的发声强度",
        "gates_hint": "门控值，从上到下为层，从左到右为步：暗为静默，亮为响亮，1 为直接相加。",
        "gate_mean": "平均 {value}",
        "gates_none": "这张图片没有使用门控。",
        "step": "步",
        "fused": "融合",
        "only": "仅",
        "no_adapters": "无适配器",
        "history": "本次访问",
        "history_hint": "点击图片恢复其设置",
        "restored": "设置已恢复；点击“生成”即可重画。",
        "search_pool": "按名称、触发词或标签搜索",
        "all_tags": "全部标签",
        "all_formats": "全部格式",
        "nothing_found": "模型库中没有符合的。",
        "shown_of": "{n} / {m}",
        "close": "关闭",
        "upload": "添加 LoRA 文件",
        "upload_hint": "把 .safetensors 文件拖到这里，或点击选择",
        "uploaded": "已添加 {name}；正在更新索引。",
        "reindex": "更新索引",
        "rebuild": "重建",
        "check": "检查所有文件",
        "checking": "正在检查 {n} / {m}",
        "indexed": "索引中有 {n} 个 LoRA。",
        "index_left_out": "未收录：",
        "file": "文件",
        "format": "格式",
        "layers": "层数",
        "rank": "秩",
        "dropped_keys": "未使用的键",
        "problem": "问题",
        "fine": "全部 {n} 个文件均可使用。",
        "not_fine": "{n} 个文件中有 {m} 个有问题。",
        "use": "用于绘图",
        "base_model": "基础模型",
        "file_size": "大小",
        "saved_style": "已存为风格 {name}。",
        "theme": "浅色或深色",
        "language": "语言",
        "queue_now": "队列中 {n} 个",
        "model": "模型",
        "reads": "模型读到的提示词",
        "seconds": "{n} 秒",
        "lost": "服务器没有响应；它还在运行吗？",
    },
}


def language_of(accept: str) -> str:
    """Choose a language by a browser's ``Accept-Language``."""
    first = accept.split(",")[0].strip().lower()
    return "zh" if first.startswith("zh") else "en"


def label(language: str, key: str) -> str:
    """Return what the page says in a language, in English where it is not known."""
    return LABELS.get(language, LABELS["en"])[key]


# ruff: noqa: RUF001 (Chinese has commas and brackets of its own)


CHINESE: Mapping[str, str] = {
    # Why an adapter takes part (autolora.retrieval, cards)
    'its name "{}" is in the prompt': "提示词里有它的名称“{}”",
    '"{}" is another name of "{}"': "“{}”是“{}”的另一种叫法",
    '"{}" is a name of the look "{}"': "“{}”就是“{}”这种风格",
    '"{}" is a synonym of its name "{}"': "“{}”与它的名称“{}”同义",
    '"{}" is a kind of its "{}"': "“{}”是它的“{}”的一种",
    '"{}" is a kind of "{}"': "“{}”是“{}”的一种",
    'its tag "{}" is in the prompt': "提示词里有它的标签“{}”",
    'its captions say "{}"': "它的图注里常说“{}”",
    '"{}" is a part of its name "{}"': "“{}”是它的名称“{}”的一部分",
    '"{}" is a keyword of its "{}"': "“{}”是它的“{}”的关键词",
    'look is close to "{}" ({}): "{}"': "风格与“{}”意思相近（{}）：“{}”",
    'phrase is close to "{}" ({}): "{}"': "图注常用语与“{}”意思相近（{}）：“{}”",
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
    # Notes on settings of other programs
    "Not in the pool: {}.": "模型库中没有：{}。",
    "Made by {}: these settings give a like picture, not the same.": (
        "由 {} 生成：这些设置只能画出相似的图片。"
    ),
    "The picture's {}, {}, was not taken over: {}.": "图片的 {}（{}）未采用：{}。",
    "The picture has {} steps; at most {} are drawn here.": "图片用了 {} 步；这里最多 {} 步。",
    "{} is another file than in the picture.": "{} 与图片所用的文件不同。",
    # What was left out of a prompt
    "The prompt ends with settings of another program ({}); they were taken out of it and are not "
    "used.": "提示词末尾有其他程序的设置（{}）；已去掉，未使用。",
    "Weights of words such as {} are not known to this model; the words are read without them. A "
    "backslash before a bracket keeps it.": (
        "这个模型不支持 {} 这样的权重；只读取文字。在括号前加反斜杠可保留括号。"
    ),
    "{} is a choice; its first, {}, was taken.": "{} 是选项；取第一个 {}。",
    "{} names a file of wildcards, which are not known here; left out.": (
        "{} 是通配符文件，这里不支持；已去掉。"
    ),
    "{} means nothing here and was taken out of the prompt.": (
        "{} 在这里没有意义，已从提示词中去掉。"
    ),
    "Of the tag {}, {} was not used.": "标签 {} 中的 {} 未使用。",
    "BREAK parts prompts in other programs; left out.": "BREAK 在其他程序中用于分段；已去掉。",
    # From the guard at the door
    "The request is too large; at most {} are taken.": "请求过大；最多接受 {}。",
}
"""Reasons and notes, which pictures keep as sentences; they are found by what they look like."""

CHINESE_ERRORS: Mapping[str, str] = {
    # What is wrong with what was asked for
    "The prompt is empty; say what the picture shall show.": "提示词是空的；请写出想画的内容。",
    "The prompt has nothing but LoRA tags; add a few words to it.": (
        "提示词里只有 LoRA 标签；请再加几个词。"
    ),
    "{} has {} characters; at most {} are possible.": "{}有 {} 个字符，最多 {} 个。",
    "The prompt": "提示词",
    "The file": "该文件",
    "The negative prompt": "“不要出现”",
    "The tag {} is not understood; write <lora:name:strength>.": (
        "无法理解标签 {}；请写成 <lora:名称:强度>。"
    ),
    "No LoRA named {} in pool {} ({} LoRAs); {}": ("模型库的 {2} 个 LoRA 中没有 {0}；{3}"),
    "Pool {} has {} LoRAs that {} may mean: {}; name one of them.": (
        "模型库（{0}）中有 {1} 个 LoRA 可能是 {2}：{3}；请指明其中一个。"
    ),
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
    "{} cannot be read as a PNG, JPEG or WebP picture: {}.": (
        "无法把 {} 作为 PNG、JPEG 或 WebP 图片读取：{}。"
    ),
    "The file is no picture and holds no generation parameters; choose a PNG, JPEG or WebP "
    "picture, or a .safetensors file to add it to the pool.": (
        "该文件不是图片，也不含生成参数；请选择 PNG、JPEG 或 WebP 图片，或选择 .safetensors "
        "文件加入模型库。"
    ),
    "The picture says nothing about how it was made.": "这张图片里没有生成信息。",
    # The pool's page
    "A file cannot be added under the name {}; send a plain file name without folders, such as "
    "my-style.safetensors.": (
        "不能以 {} 为文件名添加；请用不含文件夹的文件名，例如 my-style.safetensors。"
    ),
    "{} is not a .safetensors file; only those can be added, under names of at most {} "
    "characters.": "{} 不是 .safetensors 文件；只能添加这种文件，文件名最多 {} 个字符。",
    "{} is in the pool already, as {}{}.": "{} 已在模型库中，名为 {}{}。",
    "{} cannot be added as {}: that name is there already ({}); {}": (
        "不能把 {} 添加为 {}：已有同名文件（{}）；{}"
    ),
    "rename the file to add it.": "请改名后再添加。",
    "LoRA {} is given twice; give it once.": "LoRA {} 出现了两次；请只写一次。",
    "LoRA {} acts in steps {}, and the picture has {}; give it steps up to that, or more steps to "
    "the picture.": "LoRA {} 作用于第 {} 步，而图片只有 {} 步；请减小步号，或增加图片的步数。",
}

ENGLISH_ERRORS: Mapping[str, str] = {
    # What speaks of the shell, or of folders of the server, in the words of the page
    "No LoRA named {} in pool {} ({} LoRAs); {}": "There is no {0} among the pool's {2} LoRAs; {3}",
    "`autolora pool list` shows the names.": "“Add from pool” shows all of them.",
}

ENGLISH: Mapping[str, str] = {
    "LoRA pool {} has no .safetensors file that can be used; put some in it, or name another "
    "folder.": "The pool is empty; add LoRA files on its page, or put them into {}.",
    "LoRA pool {} does not exist; make it and put .safetensors files in it, or name another "
    "folder.": "There is no pool yet; add LoRA files on its page, or put them into {}.",
    "{} more files were left out; `autolora pool check` lists them.": (
        "{} more files were left out; “Check all files” on the pool's page lists them."
    ),
}

MESSAGES: Mapping[str, Mapping[str, str]] = {"en": ENGLISH_ERRORS, "zh": CHINESE_ERRORS}
"""Errors by language and template (`autolora.errors.Message`)."""
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
